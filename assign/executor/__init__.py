"""Run a training step under a plan: mark the captured graph, pack saved activations, and compile it."""
