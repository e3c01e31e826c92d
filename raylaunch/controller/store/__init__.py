"""What is recorded: jobs, packages, logs, secrets, tokens."""
