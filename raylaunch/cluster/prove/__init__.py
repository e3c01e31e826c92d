"""The proof that a cluster works: jobs on each node, and a check of the network between them."""
