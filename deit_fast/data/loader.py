"""Batches on the device: a resident uint8 split, an epoch's plan drawn once, one augmentation op per batch.

A small data set (CIFAR-10 is 184 MB) lives on the device as uint8. For each epoch a permutation and a plan of all
random decisions are drawn, both pure functions of (data seed, epoch, position); a batch is a slice of the plan, applied
by `ops.augment`. So there is no state to save: a run that stopped after step k continues with `epoch(e, start=k)` and
gets what it would have got, bit for bit, whatever was prefetched when it stopped.

RandAugment and TrivialAugment (`auto_augment`) have no kernel here. With them, DataLoader workers crop, flip and run
torchvision's policy on uint8, and the op does the rest; see data/auto_augment.py. Workers are used for nothing else.

Order: crop, flip, policy, color jitter, normalise, erase, mix. This is DeiT's, where `--aa` switches the jitter off;
here a jitter that is asked for is applied.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deit_fast.data.augmentation import Plan, Recipe, epoch_order, neutral_plan, sample_plan
from deit_fast.data.auto_augment import PolicyBatches, create_policy
from deit_fast.data.split import Split
from deit_fast.errors import DataError
from deit_fast.ops import augment


class TrainLoader:
    """Augmented batches of a split, a new order and new draws in every epoch.

    repeats: repeated augmentation, every chosen image that many times in a row; the epoch keeps its length.
    size: height and width of the output, default the images' own. `recipe` may be replaced between epochs.
    """

    def __init__(self, split: Split, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int,
                 batch_size: int, *, data_seed: int = 0, repeats: int = 1, smoothing: float = 0.0,
                 auto_augment: str | None = None, workers: int = 0, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, channels_last: bool = False, drop_last: bool = True,
                 size: int | None = None, backend: str | None = None) -> None:
        _check(split, batch_size, num_classes)
        if drop_last and batch_size > len(split):
            raise DataError(
                f"a batch of {batch_size} is larger than the train split of {len(split)} images. "
                f"Lower --batch-size to at most {len(split)}."
            )
        if workers < 0:
            raise ValueError(f"TrainLoader: workers must be 0 or more, got {workers}.")
        self.recipe = recipe
        self.batch_size, self.data_seed, self.repeats, self.workers = batch_size, data_seed, repeats, workers
        self.device = torch.device(device)
        self.source_size = tuple(split.images.shape[-2:])
        self.size = self.source_size if size is None else (size, size)
        self.policy = create_policy(auto_augment, mean)
        self.images = split.images if self.policy else split.images.to(self.device)
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
        M, megabytes = len(self.images), self.images.numel() / 1e6
        if self.policy is None:
            return f"{M:,} uint8 images ({megabytes:,.0f} MB) resident on {self.device}, augmented there, no workers"
        where = f"{self.workers} worker processes" if self.workers else "the main process"
        return (
            f"{M:,} uint8 images ({megabytes:,.0f} MB) in host memory; crop, flip and torchvision's {self.policy.name} "
            f"in {where}, the rest on {self.device}"
        )

    def plan(self, epoch: int, device: torch.device | str | None = None) -> Plan:
        """Everything that is drawn for an epoch, as one plan of `images_per_epoch` samples on the loader's device."""
        order = epoch_order(len(self.images), self.data_seed, epoch, self.repeats)[: self.images_per_epoch]
        return sample_plan(
            self.recipe, order, self.data_seed, epoch, self.batch_size, self.size,
            device=self.device if device is None else device, source_size=self.source_size,
        )  # fmt: skip

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates (images (B, 3, H, W), targets (B, K) float32) of an epoch from step `start` on.

        The plan is drawn with the recipe of the moment of the call.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"TrainLoader: start must lie in 0..{len(self)} (steps per epoch), got {start}.")
        return self._resident(epoch, start) if self.policy is None else self._from_workers(epoch, start)

    def _resident(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan(epoch)
        return (augment(self.images, self.labels, plan[rows], **self._options) for rows in self._slices(start))

    def _from_workers(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan(epoch, "cpu")
        batches = PolicyBatches(self.images, plan, self.policy, self.batch_size, self.size, self.data_seed, epoch)
        loader = DataLoader(
            batches, batch_size=None, sampler=range(start, len(self)), num_workers=self.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # or creating the iterator would take a draw from the global stream
        )  # fmt: skip
        rest = plan.without_geometry().to(self.device)  # what the workers have not done
        return self._finish(loader, rest, start)

    def _finish(self, loader: DataLoader, rest: Plan, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, rows in zip(loader, self._slices(start), strict=True):
            images = images.to(self.device, non_blocking=True)  # (B, 3, H, W) uint8
            labels = self.labels[rest.index[rows]]
            batch = replace(rest[rows], index=torch.arange(len(images), device=self.device))
            yield augment(images, labels, batch, **self._options)

    def _slices(self, start: int) -> list[slice]:
        B, N = self.batch_size, self.images_per_epoch
        return [slice(step * B, min((step + 1) * B, N)) for step in range(start, len(self))]


class EvalLoader:
    """Batches of a split in its own order: every image once, the last batch as short as it comes, nothing random.

    Normalised by the same op as training. size: the centre of that height and width, default the whole image.
    """

    def __init__(self, split: Split, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int,
                 batch_size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 channels_last: bool = False, size: int | None = None, backend: str | None = None) -> None:
        _check(split, batch_size, num_classes)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.images, self.labels = split.images.to(self.device), split.labels.to(self.device)
        H, W = split.images.shape[-2:]
        self.corner = (0, 0) if size is None else ((H - size) // 2, (W - size) // 2)
        self._options = dict(mean=mean, std=std, num_classes=num_classes, size=size, dtype=dtype,
                             channels_last=channels_last, backend=backend)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates (images (B, 3, H, W), labels (B,) int64)."""
        for first in range(0, len(self.images), self.batch_size):
            last = min(first + self.batch_size, len(self.images))
            plan = neutral_plan(torch.arange(first, last, device=self.device))
            if self.corner != (0, 0):
                plan = replace(plan, crop=plan.crop + torch.tensor(self.corner, dtype=torch.int32, device=self.device))
            images, _ = augment(self.images, self.labels, plan, **self._options)
            yield images, self.labels[first:last]


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Lets SIGINT and SIGTERM pass: terminals and job schedulers send them to the workers too, which are needed until the
    run has saved its state and closes them."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _check(split: Split, batch_size: int, num_classes: int) -> None:
    """DataError for a split without images, ValueError for a batch size below 1 or labels outside the classes."""
    if len(split) == 0:
        raise DataError("the split holds no images. Give a data set with at least one image per class and split.")
    if batch_size < 1:
        raise ValueError(f"loader: batch_size must be 1 or more, got {batch_size}.")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"loader: labels must lie in 0..{num_classes - 1}, found {low}..{high}.")
