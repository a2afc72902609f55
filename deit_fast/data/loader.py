"""Batches on the device: an epoch's plan drawn once, uint8 images that are there or come there, one op per batch.

For each epoch a permutation and a plan of all random decisions are drawn, both pure functions of (data seed, epoch,
position); a batch is a slice of the plan, applied by `ops.augment`. So there is no state to save: a run that stopped
after step k continues with `epoch(e, start=k)` and gets what it would have got, bit for bit, whatever was prefetched
when it stopped.

Where the images come from is the split's business, and changes no bit:

- A small data set (CIFAR-10 is 184 MB) lives on the device as uint8; the op reads it there by the plan's indices.
- One that does not fit there (`Split.stream`) lies in host memory, or in its files and is decoded by DataLoader
  workers. A batch of it is copied to the device as uint8, a quarter of fp32, and the same op applies the same rows of
  the plan.

RandAugment and TrivialAugment (`auto_augment`) have no kernel here. With them, workers crop, flip and run torchvision's
policy on uint8, and the op does the rest; see data/auto_augment.py. The processes themselves: data/workers.py.

Image files of another size are scaled and cut to the input size when they are decoded (data/scan.py), for a resident
split and a streamed one alike. RandomResizedCrop of a streamed set whose files are not all of the input size is the
one exception: there a worker takes the box from the image at its own size, where the detail is, and resizes it by
torchvision, and the op does the rest. A resident split has only the pixels of its array to crop from.

Order: crop, flip, policy, color jitter, normalise, erase, mix. This is DeiT's, where `--aa` switches the jitter off;
here a jitter that is asked for is applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from deit_fast.data.augmentation import Plan, Recipe, epoch_order, neutral_plan, sample_plan
from deit_fast.data.auto_augment import PolicyBatches, create_policy
from deit_fast.data.files import ImageFiles
from deit_fast.data.split import Split
from deit_fast.data.workers import ResizedCropBatches, StoredBatches, uint8_batches
from deit_fast.errors import DataError
from deit_fast.ops import augment


class TrainLoader:
    """Augmented batches of a split, a new order and new draws in every epoch.

    repeats: repeated augmentation, every chosen image that many times in a row; the epoch keeps its length.
    size: height and width of the output, default the images' own. workers: processes that decode files and apply
    `auto_augment`; 0: this one does. `recipe` may be replaced between epochs.
    """

    def __init__(self, split: Split, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int,
                 batch_size: int, *, data_seed: int = 0, repeats: int = 1, smoothing: float = 0.0,
                 auto_augment: str | None = None, workers: int = 0, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, channels_last: bool = False, drop_last: bool = True,
                 size: int | None = None, backend: str | None = None) -> None:
        _check(split, batch_size, num_classes, workers)
        if drop_last and batch_size > len(split):
            raise DataError(
                f"a batch of {batch_size} is larger than the train split of {len(split)} images. "
                f"Lower --batch-size to at most {len(split)}."
            )
        self.recipe = recipe
        self.batch_size, self.data_seed, self.repeats = batch_size, data_seed, repeats
        self.device = torch.device(device)
        self.source_size = tuple(split.images.shape[-2:])
        self.size = self.source_size if size is None else (size, size)
        self.policy = create_policy(auto_augment, mean)
        self.resident = self.policy is None and not split.stream
        self.images = split.images.to(self.device) if self.resident else split.images
        self.workers = workers if self.policy or isinstance(self.images, ImageFiles) else 0
        self.labels = split.labels.to(self.device)
        self.images_per_epoch = len(split) // batch_size * batch_size if drop_last else len(split)
        self._options = dict(mean=mean, std=std, num_classes=num_classes, size=size, smoothing=smoothing, dtype=dtype,
                             channels_last=channels_last, backend=backend)

    def __len__(self) -> int:
        """Steps per epoch."""
        return -(-self.images_per_epoch // self.batch_size)

    @property
    def description(self) -> str:
        """Which loading path serves, for the log."""
        M, size = len(self.images), self.images.numel() / 1e6
        if self.resident:
            return f"{M:,} uint8 images ({size:,.0f} MB) resident on {self.device}, augmented there, no workers"
        where = f"{self.workers} worker processes" if self.workers else "the main process"
        if isinstance(self.images, ImageFiles):
            crops = " and cropped" if self._crops_files else ""
            source = f"{M:,} images streamed from files below {self.images.root}, decoded{crops} by {where}"
        else:
            source = f"{M:,} uint8 images ({size:,.0f} MB) streamed from host memory"
        if self.policy is None:
            return f"{source}; augmented on {self.device}"
        return f"{source}; crop, flip and torchvision's {self.policy.name} in {where}, the rest on {self.device}"

    def plan(self, epoch: int, device: torch.device | str | None = None) -> Plan:
        """Everything that is drawn for an epoch, as one plan of `images_per_epoch` samples on the loader's device."""
        order = epoch_order(len(self.images), self.data_seed, epoch, self.repeats)[: self.images_per_epoch]
        return sample_plan(
            self.recipe, order, self.data_seed, epoch, self.batch_size, self.size,
            device=self.device if device is None else device, source_size=self.source_size,
        )  # fmt: skip

    def batch(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """(images (B, 3, H, W), targets (B, K) float32) of the B samples of a plan; not for `auto_augment`."""
        return augment(self.images, self.labels, plan, **self._options)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates (images (B, 3, H, W), targets (B, K) float32) of an epoch from step `start` on.

        The plan is drawn with the recipe of the moment of the call.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"TrainLoader: start must lie in 0..{len(self)} (steps per epoch), got {start}.")
        return self._resident(epoch, start) if self.resident else self._streamed(epoch, start)

    def _resident(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan(epoch)
        return (self.batch(plan[rows]) for rows in self._slices(start))

    def _streamed(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan(epoch, "cpu")
        batches: Dataset = StoredBatches(self.images, plan.index, self.batch_size)
        if self._crops_files:
            batches = ResizedCropBatches(self.images, plan.index, self.batch_size, self.recipe, self.size,
                                         self.data_seed, epoch)
            plan = replace(plan, resized_crop=plan.resized_crop[:0])
        if self.policy is not None:
            batches = PolicyBatches(batches, plan, self.policy, self.batch_size, self.size, self.data_seed, epoch)
            plan = plan.without_geometry()  # the workers have done it
        rest = plan.to(self.device)
        return self._finish(uint8_batches(batches, start, self.workers, self.device), rest, start)

    @property
    def _crops_files(self) -> bool:
        """Whether RandomResizedCrop is taken where files are decoded, from images of their own sizes."""
        return self.recipe.rrc and isinstance(self.images, ImageFiles) and not self.images.already_fit

    def _finish(self, batches: Iterator[Tensor], rest: Plan, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, rows in zip(batches, self._slices(start), strict=True):  # (B, 3, H, W) uint8
            yield augment(images, self.labels[rest.index[rows]], _of_batch(rest[rows]), **self._options)

    def _slices(self, start: int) -> list[slice]:
        B, N = self.batch_size, self.images_per_epoch
        return [slice(step * B, min((step + 1) * B, N)) for step in range(start, len(self))]


class EvalLoader:
    """Batches of a split in its own order: every image once, the last batch as short as it comes, nothing random.

    Normalised by the same op as training. size: the centre of that height and width, default the whole image. workers:
    processes that decode files; 0: this one does.
    """

    def __init__(self, split: Split, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int,
                 batch_size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 channels_last: bool = False, size: int | None = None, workers: int = 0,
                 backend: str | None = None) -> None:
        _check(split, batch_size, num_classes, workers)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.resident, self.labels = not split.stream, split.labels.to(self.device)
        self.images = split.images.to(self.device) if self.resident else split.images
        self.workers = workers if isinstance(self.images, ImageFiles) else 0
        self.source_size = tuple(split.images.shape[-2:])
        self.size = self.source_size if size is None else (size, size)
        self._options = dict(mean=mean, std=std, num_classes=num_classes, size=size, dtype=dtype,
                             channels_last=channels_last, backend=backend)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates (images (B, 3, H, W), labels (B,) int64)."""
        M, B = len(self.images), self.batch_size
        slices = [slice(first, first + B) for first in range(0, M, B)]
        if self.resident:
            batches = (self.images[rows] for rows in slices)
        else:
            batches = uint8_batches(StoredBatches(self.images, torch.arange(M), B), 0, self.workers, self.device)
        for images, rows in zip(batches, slices, strict=True):  # (B, 3, H, W) uint8
            plan = centred_plan(torch.arange(len(images), device=self.device), self.source_size, self.size)
            yield augment(images, self.labels[rows], plan, **self._options)[0], self.labels[rows]


def centred_plan(index: Tensor, source: tuple[int, int], size: tuple[int, int]) -> Plan:
    """The plan that leaves the images of `index` (B,) as they are but for their centre of that size being cut out.

    Where the centre is between two pixels, the upper and left one counts.
    """
    plan = neutral_plan(index)
    corner = [(have - want) // 2 for have, want in zip(source, size)]
    if corner == [0, 0]:
        return plan
    rows = [torch.full_like(index, start, dtype=torch.int32) for start in corner]  # on the device, nothing copied
    return replace(plan, crop=torch.stack(rows, dim=1))


def _of_batch(plan: Plan) -> Plan:
    """The plan of a batch for its own images: row k is image k. Partners count within the batch already."""
    return replace(plan, index=torch.arange(len(plan), device=plan.index.device))


def _check(split: Split, batch_size: int, num_classes: int, workers: int) -> None:
    """DataError for a split without images, ValueError for settings or labels out of their range."""
    if len(split) == 0:
        raise DataError("the split holds no images. Give a data set with at least one image per class and split.")
    if batch_size < 1:
        raise ValueError(f"loader: batch_size must be 1 or more, got {batch_size}.")
    if workers < 0:
        raise ValueError(f"loader: workers must be 0 or more, got {workers}.")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"loader: labels must lie in 0..{num_classes - 1}, found {low}..{high}.")
