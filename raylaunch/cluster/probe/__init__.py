"""Facts about a host, collected by a script in one round trip."""
