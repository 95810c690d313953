"""Networks: tensors in, tensors out, built from plain arguments."""

from src.models import cvt  # noqa: F401  (registers its variants)
from src.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
