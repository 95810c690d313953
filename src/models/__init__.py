"""Networks: tensors in, tensors out, built from plain arguments."""

from src.models import cvt, resnet, vit  # noqa: F401  (register their variants)
from src.models.registry import create_model, list_models, uninitialised

__all__ = ["create_model", "list_models", "uninitialised"]
