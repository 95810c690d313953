"""What benchmark.py measures: counts without running, and ours beside peers in their processes."""
