"""Counts a network's operations, or measures its speed beside peers."""
