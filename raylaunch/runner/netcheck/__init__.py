"""The check of the network between hosts."""
