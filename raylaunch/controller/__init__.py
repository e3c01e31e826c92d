"""The process next to the Ray head: records, queue, and what clients read."""
