"""A cluster of several machines over SSH."""
