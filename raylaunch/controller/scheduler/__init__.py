"""Which job starts next, and the life of each attempt."""
