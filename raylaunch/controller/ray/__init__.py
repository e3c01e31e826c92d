"""The connection to Ray and to the node agents."""
