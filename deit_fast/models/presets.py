"""The named models: timm-style names, `<family>_<size>[_distilled]_patch<p>_<image size>`.

`nano` is the size of the student report (C 64, depth 7, 8 heads, MLP 256, dropout 0.1); tiny, small and base are DeiT's
(Touvron et al. 2020, table 1), at ImageNet's 224 pixels and, for CIFAR, with 4-pixel patches at 32.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch

from .vit import VisionTransformer

NANO = {"embed_dim": 64, "depth": 7, "num_heads": 8, "drop_rate": 0.1}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
CIFAR = {"img_size": 32, "patch_size": 4, "num_classes": 10}
IMAGENET = {"img_size": 224, "patch_size": 16, "num_classes": 1000}


def _presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {
        "vit_nano_patch4_32": {**NANO, **CIFAR},
        "deit_nano_distilled_patch4_32": {**NANO, **CIFAR, "tokens": "cls+dist"},
    }
    for end, images, sizes in (("patch4_32", CIFAR, {"tiny": TINY, "small": SMALL}),
                               ("patch16_224", IMAGENET, {"tiny": TINY, "small": SMALL, "base": BASE})):
        for size, shape in sizes.items():
            presets[f"deit_{size}_{end}"] = {**shape, **images}
            presets[f"deit_{size}_distilled_{end}"] = {**shape, **images, "tokens": "cls+dist"}
    return presets


PRESETS = _presets()


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(PRESETS)


def create_model(name: str, num_classes: int | None = None, distilled: bool | None = None, tokens: str | None = None,
                 img_size: int | None = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, **kwargs: Any) -> VisionTransformer:
    """A freshly initialised model of a named preset.

    Args:
        name: one of `list_models()`.
        num_classes: size of the heads; None: the preset's (10 at 32 pixels, 1000 at 224).
        distilled: True adds the distillation token and head, False leaves them out; None: as the name says.
        tokens: "cls", "cls+cls" or "cls+dist", in place of `distilled`.
        img_size: side of the square images in pixels, divisible by the patch size.
        device, dtype: of the parameters.
        **kwargs: any other argument of `VisionTransformer`, such as drop_path_rate=0.1 or depth=4.

    Raises ValueError for an unknown name (with the nearest ones) or settings that contradict each other.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list_models()
        raise ValueError(f"there is no model {name!r}. Nearest: {', '.join(near)}.")
    if distilled is not None:
        if tokens is not None and (tokens == "cls+dist") != distilled:
            raise ValueError(f"distilled={distilled} contradicts tokens={tokens!r}; give one of them.")
        tokens = tokens or ("cls+dist" if distilled else "cls")
    given = {"num_classes": num_classes, "tokens": tokens, "img_size": img_size}
    settings = {**PRESETS[name], **{key: value for key, value in given.items() if value is not None}, **kwargs}
    return VisionTransformer(**settings).to(device=device, dtype=dtype)
