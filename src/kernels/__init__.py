"""Compiled operators for CPUs: a library (built once) and its functions as cells."""
