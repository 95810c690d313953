"""Studies: grids of training runs, their tables and their plots."""
