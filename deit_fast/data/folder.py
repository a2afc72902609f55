"""`train/<class>/*` and `test/<class>/*`, from a directory or an archive, decoded once into a cached uint8 array.

Decoding is the slow part: 60,000 JPEG files of 32 pixels cost about 8 s on one core, the array of 184 MB that they
become is read back in 0.3 s. The cache lies in `$DEIT_FAST_CACHE` (else `~/.cache/deit_fast`) under a key of path,
sizes, modification times and input size; it is written under a temporary name and renamed, carries checksums, and a
damaged one is rebuilt.

Every source becomes RGB of 8 bits: grey is repeated, palettes are looked up, CMYK is converted, alpha is dropped, 16
bits are cut to 8. An image of the right size is taken as it is. Any other is scaled (bicubic, antialiased) so that
its shorter side is the input size / 0.875 (input >= 64, the usual evaluation crop) or the input size (below),
and its centre is cut out. EXIF rotation is ignored, as in torchvision's ImageFolder.

Threads decode large files in parallel (Pillow releases the lock while it decodes). Small ones are decoded in line:
at 32 pixels two threads took 2.2 s for 20,000 files against 2.0 s in line.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from deit_fast.data.archive import read_entries, source_key
from deit_fast.errors import DataError

CACHE_FORMAT = 1  # raise it when decoding changes, so that older caches are not taken for current ones
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


@dataclass(frozen=True)
class FolderArrays:
    """Decoded splits: images (M, 3, S, S) uint8 and labels (M,) int64 per split, in order of file name."""

    classes: tuple[str, ...]
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    bad: tuple[str, ...]  # "name (why)" of every file that could not be decoded
    ignored: tuple[str, ...]  # files in class folders that are no images by their suffix
    small_jpegs: int  # JPEG files of at most 32 pixels
    own_validation: bool  # a third split was there and was not read


def load_folder(path: Path, input_size: int, skip_bad_images: bool, log: Callable[[str], None]) -> FolderArrays:
    """The decoded folder or archive, from the cache if it is current; DataError if it is not a usable data set."""
    if not path.exists():
        raise DataError(f"{path}: no such file or directory. Give an existing one with --data-path.")
    key = hashlib.sha256(f"{CACHE_FORMAT} {source_key(path)}".encode()).hexdigest()[:32]
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.resolve().name)
    cache = cache_dir() / f"{stem}-{input_size}px-{key}.npz"
    arrays = _read_cache(cache, log)
    if arrays is None:
        log(f"decoding {path} to {input_size} pixels (once; kept in {cache.parent})")
        start = time.perf_counter()
        arrays = decode_folder(path, input_size)
        total = sum(map(len, arrays.images.values()))
        log(f"decoded {total:,} images in {time.perf_counter() - start:.1f} s")
        if not arrays.bad or skip_bad_images:
            _write_cache(cache, arrays, log)
    if arrays.bad and not skip_bad_images:
        raise DataError(
            f"{path}: {len(arrays.bad)} of {len(arrays.bad) + sum(map(len, arrays.images.values()))} images cannot be "
            f"decoded: {_few(arrays.bad)}. Replace them, or pass --skip-bad-images to train without them."
        )
    return arrays


def cache_dir() -> Path:
    """Where decoded data sets are kept."""
    return Path(os.environ.get("DEIT_FAST_CACHE") or Path("~/.cache/deit_fast").expanduser())


def decode_folder(path: Path, input_size: int) -> FolderArrays:
    """The decoded folder or archive; DataError if its layout or content cannot be a data set."""
    images: dict[tuple[str, str, str], np.ndarray] = {}  # (split, class, name) -> (3, S, S) uint8
    folders: set[tuple[str, str]] = set()
    tops: set[str] = set()
    seen: set[str] = set()
    others: set[str] = set()
    bad, ignored = {}, []
    small_jpegs = total_bytes = 0
    memory = physical_memory()

    def wanted(name: str) -> bool:
        parts = name.split("/")
        seen.add(parts[0])
        place = _place(name)
        if not place and any(part in VALIDATION for part in parts[:2]):
            others.add(name)
        return len(place) > 2

    def image_files() -> Iterator[tuple[str, bytes]]:
        for name, content in read_entries(path, wanted):
            top, split, folder, *rest = _place(name)
            is_image = content is not None and name.lower().endswith(IMAGE_SUFFIXES)
            if is_image and not rest:
                raise DataError(f"{path}: {name} lies in no class folder, so it has no label. {LAYOUT}")
            if rest or content is None:
                tops.add(top)
                folders.add((split, folder))
            if is_image:
                yield name, content
            elif content is not None:
                ignored.append(name)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in _batches(image_files()):
            threaded = sum(len(content) for _, content in batch) > THREADED_BYTES * len(batch)
            jobs = [(name, content, input_size) for name, content in batch]
            for (name, _), (pixels, what) in zip(batch, (pool.map if threaded else map)(_decode, jobs), strict=True):
                if pixels is None:
                    bad[name] = what
                    continue
                small_jpegs += what == "small jpeg"
                total_bytes += pixels.nbytes
                images[(*_place(name)[1:3], name)] = pixels
            if 2 * total_bytes > memory:  # once as pieces, once as the array
                raise DataError(
                    f"{path}: more than {len(images):,} images of {input_size} pixels do not fit into this machine's "
                    f"memory ({memory / 2**30:.1f} GiB). Lower --input-size or use fewer images."
                )
    classes = _check_layout(path, tops, seen, folders, images, bad)
    labels = {name: i for i, name in enumerate(classes)}
    order = sorted(images)
    split_images, split_labels = {}, {}
    for split in SPLITS:
        members = [place for place in order if place[0] == split]
        split_images[split] = np.empty((len(members), 3, input_size, input_size), np.uint8)
        for row, place in enumerate(members):
            split_images[split][row] = images.pop(place)  # frees the piece as the array fills
        split_labels[split] = np.array([labels[place[1]] for place in members], np.int64)
    problems = tuple(f"{name} ({why})" for name, why in sorted(bad.items()))
    left_out = tuple(sorted(ignored))
    return FolderArrays(classes, split_images, split_labels, problems, left_out, small_jpegs, bool(others))


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


def _decode(job: tuple[str, bytes, int]) -> tuple[np.ndarray | None, str]:
    """(pixels (3, S, S) uint8, "small jpeg" or "") of one file, or (None, why it cannot be decoded)."""
    _, content, size = job
    try:
        with Image.open(io.BytesIO(content)) as image:
            small_jpeg = image.format == "JPEG" and max(image.size) <= 32
            if max(image.size) > MOST_ASPECT * min(image.size):
                return None, f"{image.size[0]} x {image.size[1]} pixels are a line, not a picture"
            image.load()
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                return None, f"pixels of mode {image.mode!r} have no known range; save them with 8 bits"
            pixels = np.asarray(_fit(image.convert("RGB"), size))
    except DECODE_ERRORS as error:
        return None, "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), "small jpeg" if small_jpeg else ""


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


def _check_layout(path, tops, seen, folders, images, bad) -> tuple[str, ...]:
    """The class names; DataError unless both splits hold the same, at least two, classes with an image in each."""
    if len(tops) > 1:
        raise DataError(f"{path}: several folders hold splits: {_few(sorted(tops))}. {LAYOUT}")
    names = {split: {folder for where, folder in folders if where == split} for split in SPLITS}
    for split in SPLITS:
        if not names[split]:
            raise DataError(
                f"{path}: no class folder under {split}/ (at the top: {_few(sorted(seen)) or 'nothing'}). {LAYOUT}"
            )
    if names["train"] != names["test"]:
        only = {a: sorted(names[a] - names[b]) for a, b in (SPLITS, SPLITS[::-1])}
        where = "; ".join(f"only in {split}: {_few(found)}" for split, found in only.items() if found)
        raise DataError(f"{path}: train and test hold different classes ({where}). Make the folders agree.")
    if len(names["train"]) < 2:
        raise DataError(f"{path}: one class only ({_few(names['train'])}). Classification needs two. {LAYOUT}")
    filled = {place[:2] for place in images}
    empty = sorted(f"{split}/{name}" for split, name in folders if (split, name) not in filled)
    if empty:
        broken = f" ({len(bad)} files could not be decoded: {_few(sorted(bad))})" if bad else ""
        remedy = "Add images, or remove the class from both splits."
        raise DataError(f"{path}: no images in {_few(empty)}{broken}. {remedy}")
    return tuple(sorted(names["train"]))


def _few(names) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def physical_memory() -> int:
    """Bytes of this machine's memory: all of it, since what counts as free leaves out the file cache."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_cache(path: Path, log: Callable[[str], None]) -> FolderArrays | None:
    """The arrays in the cache file, or None if there is none or it is damaged (said in the log)."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # all checksums: np.load stops where a damaged header says so
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        with np.load(path, allow_pickle=False) as stored:
            meta = json.loads(str(stored["meta"]))
            images = {split: stored[f"{split}_images"] for split in SPLITS}
            labels = {split: stored[f"{split}_labels"] for split in SPLITS}
        lists = {name: tuple(meta[name]) for name in ("classes", "bad", "ignored")}
        counts = {name: meta[name] for name in ("small_jpegs", "own_validation")}
        return FolderArrays(images=images, labels=labels, **lists, **counts)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        log(f"the decoded copy {path} is damaged ({error}); decoding again")
        return None


def _write_cache(path: Path, arrays: FolderArrays, log: Callable[[str], None]) -> None:
    """Writes the cache file whole or not at all; a full or read-only disk costs the next run time, nothing else."""
    meta = {name: getattr(arrays, name) for name in ("classes", "bad", "ignored", "small_jpegs", "own_validation")}
    stored = {f"{split}_images": arrays.images[split] for split in SPLITS}
    stored |= {f"{split}_labels": arrays.labels[split] for split in SPLITS}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, meta=np.array(json.dumps(meta)), **stored)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        log(f"the decoded copy could not be kept in {path.parent} ({error}); set DEIT_FAST_CACHE to a writable folder")
        if temporary is not None:
            temporary.unlink(missing_ok=True)
