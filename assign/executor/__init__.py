"""A plan made to run: mark the captured graph, pack what waits for the backward pass, hand it to a backend."""
