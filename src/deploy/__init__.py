"""From a checkpoint to its use: export and prediction."""

from src.deploy.classify import find_images
from src.deploy.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "find_images"]
