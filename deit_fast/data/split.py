"""Splits of a data set. Stratified: every class gives the same share of its images, so small classes stay represented.

The choice is a pure function of (labels, fraction, seed). A validation split that moved between two runs would hand
the second run images that the first one trained on, and make their best epochs incomparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deit_fast.data.files import ImageFiles
from deit_fast.errors import DataError


@dataclass(frozen=True)
class Split:
    """Images (M, 3, H, W) uint8 and labels (M,) int64.

    stream: loaders copy the images to their device batch by batch, instead of all at once to stay there.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    stream: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.images, ImageFiles) and not self.stream:
            raise ValueError("Split: images that lie in files can only be streamed. Pass stream=True.")
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                f"Split: images must be uint8 of shape (M, 3, H, W), got {self.images.dtype} "
                f"{tuple(self.images.shape)}."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"Split: labels must be int64 of shape ({len(self.images)},), got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: Tensor) -> Split:
        """The rows `index` (K,) int64; pixels in memory are copied."""
        images = self.images
        rows = images.subset(index) if isinstance(images, ImageFiles) else images[index]
        return Split(rows, self.labels[index], self.stream)


def stratified_split(labels: Tensor, classes: tuple[str, ...], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two sorted int64 index tensors (kept, held out) that share no element and together hold every index.

    labels: (N,) int64 in [0, len(classes)). Each class holds out round(fraction * its images), at least one.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"stratified_split: fraction must lie strictly between 0 and 1, got {fraction}.")
    generator = torch.Generator().manual_seed(seed)
    kept, held_out = [], []
    for label, name in enumerate(classes):
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise DataError(
                f"class {name!r} has {len(members)} training images, and a validation split of {fraction:g} would "
                "leave none to train on. Lower --val-split, pass --val-split 0, or add images."
            )
        held_out.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(held_out).sort().values
