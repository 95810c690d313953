"""Starting a job on one host or many: read the plan, start its ranks, end them together."""
