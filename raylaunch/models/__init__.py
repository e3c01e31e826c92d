"""What is asked for (specs) and what is observed (states). The same models are the wire format."""
