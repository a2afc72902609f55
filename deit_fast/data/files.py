"""Images that stay in their files and are decoded each time they are read.

A directory whose decoded images would not fit is used from where it lies: an `ImageFiles` stands where a resident
split has its tensor (M, 3, S, S), and indexing it decodes. An image comes out as it would from the decoded array, bit
for bit (`scan.decode` makes both), so it does not matter to a plan or a model which of the two a split has.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deit_fast.data.scan import decode
from deit_fast.errors import DataError


class ImageFiles:
    """(M, 3, S, S) uint8 images, each decoded from its file below `root` when it is indexed.

    arrays: what `folder.index_folder` knows of the M files, by "names", "digests", "sums" and "sizes" (see
        `folder.Contents`).
    """

    dtype, ndim = torch.uint8, 4

    def __init__(self, root: Path, size: int, arrays: dict[str, np.ndarray]) -> None:
        self.root, self.size, self.arrays = root, size, arrays

    @property
    def shape(self) -> torch.Size:
        """(M, 3, S, S), as if they were decoded."""
        return torch.Size((len(self), 3, self.size, self.size))

    def numel(self) -> int:
        """Bytes that they would take."""
        return self.shape.numel()

    def __len__(self) -> int:
        return len(self.arrays["names"])

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        """(3, S, S) of one row; (K, 3, S, S) of rows that are a slice or int64 (K,).

        DataError names a file that cannot be read or decoded.
        """
        names = self.arrays["names"][rows.numpy() if isinstance(rows, Tensor) else rows]
        if isinstance(names, bytes):
            return torch.from_numpy(self._read(names, self.size))
        images = torch.empty((len(names), 3, self.size, self.size), dtype=torch.uint8)
        for image, name in zip(images.numpy(), names, strict=True):
            image[:] = self._read(name, self.size)
        return images

    def original(self, row: int) -> Tensor:
        """(3, h, w) uint8: an image at its own size."""
        return torch.from_numpy(self._read(self.arrays["names"][row], None))

    @property
    def already_fit(self) -> bool:
        """Whether every file has S x S pixels, so that decoding changes none."""
        return bool((self.arrays["sizes"] == self.size).all())

    def _read(self, name: bytes, size: int | None) -> np.ndarray:
        """(3, size, size) uint8; None: at its own size."""
        path = self.root / os.fsdecode(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read any more ({error.strerror}). Put it back, or start again: the "
                            "next run takes the directory as it is then.") from error
        pixels, why, _ = decode(content, size)
        if pixels is None:
            raise DataError(f"{path}: cannot be decoded any more ({why}). Replace it, or start again with "
                            "--skip-bad-images.")
        return pixels

    def subset(self, rows: Tensor) -> ImageFiles:
        """Only the rows (K,) int64; decodes nothing."""
        return ImageFiles(self.root, self.size, {name: array[rows.numpy()] for name, array in self.arrays.items()})

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """`datasets.pixel_statistics` of the images, from the sums of the index.

        Equal but for the last bits of a float64, which the augmentation op rounds away.
        """
        count = self.size**2 * len(self)
        mean, std = [], []
        for value, square in self.arrays["sums"].sum(0).T.tolist():  # of a channel: exact integers
            mean.append(value / (255 * count))
            std.append(max(math.sqrt((count * square - value**2) / (255 * count) ** 2), 1 / 255))
        return tuple(mean), tuple(std)
