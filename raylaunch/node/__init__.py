"""The steward: raylaunch's hands on each node."""
