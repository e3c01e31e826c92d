"""What is wrong with hosts, and what mends it."""
