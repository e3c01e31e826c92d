"""Files and flags, read into specs."""
