"""From here to a cluster elsewhere: its tunnel, and lanes for large files."""
