"""The models: Vision Transformers by name, with timm's parameter names."""

from .freeze import FrozenVisionTransformer, freeze
from .load import load_weights
from .presets import create_model, list_models
from .vit import VisionTransformer

__all__ = ["FrozenVisionTransformer", "VisionTransformer", "create_model", "freeze", "list_models", "load_weights"]
