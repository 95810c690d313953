"""Checks that a device computes CvT correctly: python -m tools.check_device."""
