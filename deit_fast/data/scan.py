"""One pass over the images of `train/<class>/*` and `test/<class>/*`: which decode, and whether they are a data set.

Every source becomes RGB of 8 bits: grey is repeated, palettes are looked up, CMYK is converted, alpha is dropped, 16
bits are cut to 8. An image of the right size is taken as it is. Any other is scaled (bicubic, antialiased) so that
its shorter side is the input size / 0.875 (input >= 64, the usual evaluation crop) or the input size (below),
and its centre is cut out. EXIF rotation is ignored, as in torchvision's ImageFolder.

Threads decode large files in parallel (Pillow releases the lock while it decodes). Small ones are decoded in line:
at 32 pixels two threads took 2.2 s for 20,000 files against 2.0 s in line.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from deit_fast.data.archive import read_entries
from deit_fast.errors import DataError

SPLITS = ("train", "test")
VALIDATION = ("val", "valid", "validation")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".gif", ".tif", ".tiff", ".webp")
LAYOUT = "Expected train/<class>/<image> and test/<class>/<image>, at the top or below one folder."
THREADED_BYTES = 8192  # mean file size from which a thread pool pays
MOST_ASPECT = 64  # scaling the shorter side of a line of pixels would need gigabytes
BATCH_FILES, BATCH_BYTES = 512, 64 << 20
# what Pillow raises for damaged files, by format
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error,
                 zlib.error, Image.DecompressionBombError)  # fmt: skip

Place = tuple[str, str, str]  # split, class, name of an image


@dataclass(frozen=True)
class Findings:
    """What a pass found beside the images' pixels."""

    classes: tuple[str, ...]
    bad: tuple[str, ...]  # "name (why)" of every file that could not be decoded
    ignored: tuple[str, ...]  # files in class folders that are no images by their suffix
    small_jpegs: int  # JPEG files of at most 32 pixels
    own_validation: bool  # a third split was there and was not read


class Scan:
    """Iterate it once for (place, pixels (3, S, S) uint8, own (h, w)) of every image that decodes; then ask for findings."""

    def __init__(self, path: Path, input_size: int) -> None:
        self.path, self.input_size = path, input_size
        self._decoded: set[Place] = set()
        self._folders: set[tuple[str, str]] = set()
        self._tops: set[str] = set()
        self._seen: set[str] = set()
        self._bad: dict[str, str] = {}
        self._ignored: list[str] = []
        self._small_jpegs, self._own_validation = 0, False

    def __iter__(self) -> Iterator[tuple[Place, np.ndarray, tuple[int, int]]]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for batch in _batches(self._files()):
                threaded = sum(len(content) for _, content in batch) > THREADED_BYTES * len(batch)
                jobs = [(content, self.input_size) for _, content in batch]
                decoded = (pool.map if threaded else map)(decode, *zip(*jobs))
                for (name, _), (pixels, what, own_size) in zip(batch, decoded, strict=True):
                    if pixels is None:
                        self._bad[name] = what
                        continue
                    self._small_jpegs += what == "small jpeg"
                    place = (*_place(name)[1:3], name)
                    self._decoded.add(place)
                    yield place, pixels, own_size

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """(name, content) of every image file in a class folder; notes the rest."""
        for name, content in read_entries(self.path, self._wants):
            top, split, folder, *rest = _place(name)
            is_image = content is not None and name.lower().endswith(IMAGE_SUFFIXES)
            if is_image and not rest:
                raise DataError(f"{self.path}: {name} lies in no class folder, so it has no label. {LAYOUT}")
            if rest or content is None:
                self._tops.add(top)
                self._folders.add((split, folder))
            if is_image:
                yield name, content
            elif content is not None:
                self._ignored.append(name)

    def _wants(self, name: str) -> bool:
        parts = name.split("/")
        self._seen.add(parts[0])
        place = _place(name)
        if not place and any(part in VALIDATION for part in parts[:2]):
            self._own_validation = True
        return len(place) > 2

    def findings(self) -> Findings:
        """After the pass; DataError unless both splits hold the same, at least two, classes with an image in each."""
        self._check_layout()
        bad = tuple(f"{name} ({why})" for name, why in sorted(self._bad.items()))
        classes = tuple(sorted({folder for _, folder in self._folders}))
        return Findings(classes, bad, tuple(sorted(self._ignored)), self._small_jpegs, self._own_validation)

    def _check_layout(self) -> None:
        path = self.path
        if len(self._tops) > 1:
            raise DataError(f"{path}: several folders hold splits: {few(sorted(self._tops))}. {LAYOUT}")
        names = {split: {folder for where, folder in self._folders if where == split} for split in SPLITS}
        for split in SPLITS:
            if not names[split]:
                raise DataError(f"{path}: no class folder under {split}/ (at the top: "
                                f"{few(sorted(self._seen)) or 'nothing'}). {LAYOUT}")
        if names["train"] != names["test"]:
            only = {a: sorted(names[a] - names[b]) for a, b in (SPLITS, SPLITS[::-1])}
            where = "; ".join(f"only in {split}: {few(found)}" for split, found in only.items() if found)
            raise DataError(f"{path}: train and test hold different classes ({where}). Make the folders agree.")
        if len(names["train"]) < 2:
            raise DataError(f"{path}: one class only ({few(names['train'])}). Classification needs two. {LAYOUT}")
        filled = {place[:2] for place in self._decoded}
        empty = sorted(f"{split}/{name}" for split, name in self._folders if (split, name) not in filled)
        if empty:
            bad = self._bad
            broken = f" ({len(bad)} files could not be decoded: {few(sorted(bad))})" if bad else ""
            remedy = "Add images, or remove the class from both splits."
            raise DataError(f"{path}: no images in {few(empty)}{broken}. {remedy}")


def count_images(names: Iterable[str]) -> int:
    """How many of these names a Scan would take for images."""
    return sum(len(_place(name)) > 3 and name.lower().endswith(IMAGE_SUFFIXES) for name in names)


def _place(name: str) -> tuple[str, ...]:
    """(folder above, split, class, rest...) as far as `name` has them; () for what is hidden or outside the splits."""
    parts = name.split("/")
    if any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini") for part in parts):
        return ()
    for depth in (0, 1):
        if len(parts) > depth and parts[depth] in SPLITS:
            return ("/".join(parts[:depth]), *parts[depth:])
    return ()


def _batches(entries: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch, size = [], 0
    for entry in entries:
        batch.append(entry)
        size += len(entry[1])
        if len(batch) == BATCH_FILES or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def decode(content: bytes, size: int | None) -> tuple[np.ndarray | None, str, tuple[int, int]]:
    """(pixels (3, S, S) uint8, "small jpeg" or "", own (h, w)) of a file's content, or (None, why not, (0, 0)).

    size: S; None: pixels (3, h, w).
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            small_jpeg = image.format == "JPEG" and max(image.size) <= 32
            if max(image.size) > MOST_ASPECT * min(image.size):
                return None, f"{image.size[0]} x {image.size[1]} pixels are a line, not a picture", (0, 0)
            image.load()
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                return None, f"pixels of mode {image.mode!r} have no known range; save them with 8 bits", (0, 0)
            rgb = image.convert("RGB")
            pixels = np.asarray(rgb if size is None else _fit(rgb, size))
    except DECODE_ERRORS as error:
        why = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        return None, why, (0, 0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), "small jpeg" if small_jpeg else "", rgb.size[::-1]


def _fit(image: Image.Image, size: int) -> Image.Image:
    """The image itself if it is size x size, else its centre after scaling the shorter side."""
    if image.size == (size, size):
        return image
    shorter = int(size / 0.875) if size >= 64 else size
    scale = shorter / min(image.size)
    width, height = (shorter if side == min(image.size) else int(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)  # roundings as in torchvision's CenterCrop
    return image.crop((left, top, left + size, top + size))


def few(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
