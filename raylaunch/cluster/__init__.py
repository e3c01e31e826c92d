"""Where a cluster lives: starting, finding and ending it."""
