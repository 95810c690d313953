"""Evaluate networks: metrics, label protocols and reports."""
