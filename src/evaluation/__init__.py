"""Evaluation that counts every image exactly once."""
