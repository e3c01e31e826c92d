"""One host over SSH: connecting, trusting, running scripts, moving files."""
