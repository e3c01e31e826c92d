"""The environment of an attempt: found, built or layered."""
