"""The study's figures that show images: augmentation as the kernel makes it, and what the tokens look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

from deit_fast.data.augmentation import Plan, Recipe, neutral_plan, sample_plan
from deit_fast.data.datasets import ImageData
from deit_fast.data.split import Split
from deit_fast.models import VisionTransformer
from deit_fast.ops import augment
from deit_fast.training.report import shorten
from deit_fast.training.study.figures import new_figure, save
from deit_fast.training.study.inspection import attention_maps

COLUMNS = 8


def choose(labels: Tensor, count: int) -> Tensor:
    """(count,) int64 or fewer: the first image of every class, then the second, and so on; labels (M,)."""
    place = torch.zeros_like(labels)  # (M,) which image of its class each is
    for label in labels.unique():
        members = labels == label
        place[members] = torch.arange(int(members.sum()))
    return torch.argsort(place * (int(labels.max()) + 1) + labels)[:count]


def plot_augmentation(folder: Path, name: str, data: ImageData, recipe: Recipe, data_seed: int) -> None:
    """Draws training images under each operation of a recipe, made certain to happen, then under the recipe itself."""
    index = choose(data.train.labels, COLUMNS)
    sure = {"mixup_prob": 1.0, "mixup_mode": "elem", "remode": recipe.remode, "recount": recipe.recount}
    rows = {
        "original": None,
        "random crop": Recipe(crop_pad=recipe.crop_pad or 4, padding_mode=recipe.padding_mode, rrc=recipe.rrc,
                              scale=recipe.scale, ratio=recipe.ratio, interpolation=recipe.interpolation),
        "flip": Recipe(hflip=1.0) if data.flips else None,
        "color jitter": Recipe(brightness=recipe.brightness, contrast=recipe.contrast, saturation=recipe.saturation,
                               hue=recipe.hue),
        "random erasing": Recipe(reprob=1.0, **sure),
        "MixUp": Recipe(mixup=recipe.mixup or 0.2, **sure),
        "CutMix": Recipe(cutmix=recipe.cutmix or 1.0, **sure),
        "all, as trained": recipe,
    }
    if not data.flips:
        del rows["flip"]
    figure = new_figure(1.25 * len(index) + 1.6, 1.3 * len(rows))
    axes = figure.subplots(len(rows), len(index), squeeze=False)
    for line, (label, what) in zip(axes, rows.items()):
        plan = neutral_plan(index) if what is None else _plan(what, index, data, data_seed)
        for axis, image in zip(line, _images(data, plan)):
            _show(axis, image)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    save(folder, name, figure)


def _plan(recipe: Recipe, index: Tensor, data: ImageData, data_seed: int) -> Plan:
    return sample_plan(recipe, index, data_seed, 0, len(index), tuple(data.train.images.shape[-2:]))


def _images(data: ImageData, plan: Plan) -> Tensor:
    """(B, H, W, 3) in 0..1 of the training images under a plan, as the augmentation op makes them."""
    return _visible(_augmented(data.train, plan, data), data)


def _augmented(split: Split, plan: Plan, data: ImageData) -> Tensor:
    """(B, 3, H, W): the images of a split under a plan; only these are read, since a split may lie in files."""
    own = replace(plan, index=torch.arange(len(plan)))
    images, _ = augment(split.images[plan.index], split.labels[plan.index], own, data.mean, data.std, len(data.classes))
    return images


def _visible(images: Tensor, data: ImageData) -> Tensor:
    """Normalised images (B, 3, H, W) as pixels (B, H, W, 3) in 0..1."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    return (images.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


def plot_attention(folder: Path, name: str, data: ImageData, models: Sequence[tuple[str, VisionTransformer]]) -> None:
    """Draws test images with what each model's prefix tokens attend to in the last block."""
    index = choose(data.test.labels, COLUMNS)
    images = _augmented(data.test, neutral_plan(index), data)
    rows = []
    for label, model in models:
        maps = attention_maps(model, images.to(model.cls_token.device)).cpu()  # (B, P, g, g)
        second = {"cls": [], "cls+dist": ["distillation token"], "cls+cls": ["second class token"]}[model.tokens]
        rows += [(f"{label}\n{token}", maps[:, number]) for number, token in enumerate(["class token", *second])]
    figure = new_figure(1.25 * len(index) + 2.2, 1.35 * (len(rows) + 1))
    axes = figure.subplots(len(rows) + 1, len(index), squeeze=False)
    pixels = _visible(images, data)
    for axis, image, label in zip(axes[0], pixels, data.test.labels[index].tolist()):
        _show(axis, image)
        axis.set_title(shorten(data.classes[label]), fontsize=10, parse_math=False)
    axes[0][0].set_ylabel("test image", rotation=0, ha="right", va="center", fontsize=10)
    extent = (-0.5, pixels.shape[2] - 0.5, pixels.shape[1] - 0.5, -0.5)
    for line, (label, maps) in zip(axes[1:], rows):
        for axis, image, weights in zip(line, pixels, maps):
            _show(axis, image.mean(dim=-1, keepdim=True).expand(-1, -1, 3))
            axis.imshow(weights.numpy(), cmap="viridis", alpha=0.65, extent=extent, interpolation="bilinear")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    save(folder, name, figure)


def _show(axis: Axes, image: Tensor) -> None:
    """An image (H, W, 3) without ticks."""
    axis.imshow(image.numpy(), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
