"""One machine over SSH: connecting, trusting, running scripts, moving files."""
