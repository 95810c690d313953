"""Plots of runs and results."""
