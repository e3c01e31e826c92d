"""From here to a cluster elsewhere: its tunnel, and `ssh` for large files."""
