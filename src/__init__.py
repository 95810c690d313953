"""CvT for MindSpore."""

from src import forks as forks  # its hook must be there before any fork
