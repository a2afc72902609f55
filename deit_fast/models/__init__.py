"""The models: Vision Transformers by name, with timm's parameter names."""

from .load import load_weights
from .presets import create_model, list_models
from .vit import VisionTransformer

__all__ = ["VisionTransformer", "create_model", "list_models", "load_weights"]
