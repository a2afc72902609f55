"""Batches of uint8 images on their way to the device: made in worker processes, pinned, copied ahead on a side stream.

Workers decode, and apply torchvision's policies; they run plain torch, torchvision and Pillow only, none of our
kernels, because OpenMP does not survive the fork. Each makes whole batches, by number, so neither how many there are
nor where an epoch was resumed changes what comes out. On a GPU a batch is pinned and copied while the one before is
used.

What goes wrong in a worker arrives as the DataError that it is. A worker that is killed (mostly for memory) becomes one
in `worker_errors`: PyTorch raises its RuntimeError from a signal handler, wherever the main process happens to be.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit_fast.data.augmentation import Recipe, sample_plan
from deit_fast.data.files import ImageFiles
from deit_fast.errors import DataError

SIGNAL_SECONDS = 5.0  # the longest wait for a signal that the system has sent already


class StoredBatches(Dataset):
    """Item k: the images of batch k as they are stored, (B, 3, H, W) uint8.

    images: (M, 3, H, W) uint8, in memory or in files; index: (N,) int64, which of them come, in order.
    """

    def __init__(self, images: Tensor | ImageFiles, index: Tensor, batch_size: int) -> None:
        self.images, self.index, self.batch_size = images, index, batch_size

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __getitem__(self, batch: int) -> Tensor:
        return self.images[self.index[batch * self.batch_size : (batch + 1) * self.batch_size]]


class ResizedCropBatches(Dataset):
    """Item k: batch k after RandomResizedCrop of each image from its file at its own size, (B, 3, *size) uint8.

    The box of a position is what `sample_plan` draws there for an image of that height and width, so it too is a
    function of (data seed, epoch, position); torchvision resizes it. Arguments are those of StoredBatches and of
    `sample_plan`.
    """

    def __init__(self, images: ImageFiles, index: Tensor, batch_size: int, recipe: Recipe, size: tuple[int, int],
                 data_seed: int, epoch: int) -> None:
        self.images, self.index, self.batch_size, self.size = images, index, batch_size, size
        self.recipe = Recipe(rrc=True, scale=recipe.scale, ratio=recipe.ratio, interpolation=recipe.interpolation)
        self.data_seed, self.epoch = data_seed, epoch

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __getitem__(self, batch: int) -> Tensor:
        first = batch * self.batch_size
        positions = range(first, min(first + self.batch_size, len(self.index)))
        return torch.stack([self._cropped(position) for position in positions])

    def _cropped(self, position: int) -> Tensor:
        """(3, *size) uint8."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resized_crop

        image = self.images.original(int(self.index[position]))  # (3, h, w)
        plan = sample_plan(self.recipe, self.index[position : position + 1], self.data_seed, self.epoch, 1, self.size,
                           position, source_size=tuple(image.shape[1:]))
        mode = InterpolationMode.BICUBIC if plan.bicubic[0] else InterpolationMode.BILINEAR
        return resized_crop(image, *plan.resized_crop[0].tolist(), list(self.size), mode, antialias=True)


class _WithErrors(Dataset):
    """The items of a dataset, or the DataError met in making one: raised in a worker it would arrive as a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, batch: int) -> Tensor | DataError:
        try:
            return self.dataset[batch]
        except DataError as error:
            return error


def uint8_batches(dataset: Dataset, start: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    """Iterates the batches (B, 3, H, W) of `dataset` from number `start` on, on the device.

    workers: processes that make them; 0: this one, when a batch is asked for. Raises DataError.
    """
    loader = DataLoader(
        _WithErrors(dataset), batch_size=None, sampler=range(start, len(dataset)), num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # or creating the iterator would take a draw from the global stream
    )  # fmt: skip
    return _copied(_received(loader), device)


def _received(loader: DataLoader) -> Iterator[Tensor]:
    with worker_errors():
        try:
            for batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # a batch of a worker that has just died
            time.sleep(SIGNAL_SECONDS)  # the news of its death, which PyTorch raises here
            raise RuntimeError("DataLoader worker does not answer") from error


def _copied(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on the device; on a GPU each is copied, by a stream of its own, while the one before is used."""
    if device.type != "cuda":
        yield from batches
        return
    side, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            copy = batch.to(device, non_blocking=True)
        if ahead is not None:
            yield _handed_over(*ahead)
        ahead = copy, side.record_event()
    if ahead is not None:
        yield _handed_over(*ahead)


def _handed_over(copy: Tensor, done: torch.cuda.Event) -> Tensor:
    """The copy, for the current stream, which waits until it is whole; the host does not."""
    stream = torch.cuda.current_stream(copy.device)
    stream.wait_event(done)
    copy.record_stream(stream)  # or its memory could be given to the side stream's next copy while it is still read
    return copy


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turns PyTorch's news of a dead worker into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        what = str(error).split(". ")[0].rstrip(". ")
        raise DataError(f"a process that prepares images has died ({what}). Memory or /dev/shm may be too small: lower "
                        "--workers, --batch-size or --input-size.") from error


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Lets SIGINT and SIGTERM pass: terminals and job schedulers send them to the workers too.

    They are needed until the run has saved its state and closes them. Only the parent's own SIGTERM ends a worker: Python
    sends it to the children that are left when the parent exits, after a crash for instance, and then waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the threads to come too
    threading.Thread(target=_exit_when_told, args=(os.getppid(),), daemon=True).start()


def _exit_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
