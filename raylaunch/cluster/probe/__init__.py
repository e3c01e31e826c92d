"""What a host is: looked at in one round trip, and read into facts."""
