"""Export trained networks and classify images with them."""

from src.deploy.classify import find_images
from src.deploy.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor", "find_images"]
