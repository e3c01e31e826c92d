"""The proof that a cluster works: jobs on each node, and an all-reduce between them."""
