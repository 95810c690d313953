"""The checks themselves, one module for each part of the system."""
