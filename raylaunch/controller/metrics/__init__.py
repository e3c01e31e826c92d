"""Metrics of jobs, read from the files of W&B and from reports."""
