"""A plan made to run: mark the captured graph, pack saved activations, and hand it to a backend."""
