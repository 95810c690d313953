"""CvT for MindSpore."""
