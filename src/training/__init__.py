"""Training: one step as one graph, and the run around it."""
