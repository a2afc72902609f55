"""`train/<class>/*` and `test/<class>/*`, from a directory or an archive, read once into a cached file.

What is kept is one of two things. `load_folder` keeps the pixels: 60,000 JPEG files of 32 pixels cost about 8 s on one
core, the array of 184 MB that they become is read back in 0.3 s. `index_folder`, for a directory whose pixels would not
fit into memory, decodes every file too but keeps only its name, a digest and its sums: bad files show before training
begins instead of in the middle of an epoch, mean and std come from the same pixels, and the set has a fingerprint.

The cache lies in `$DEIT_FAST_CACHE` (else `~/.cache/deit_fast`) under a key of path, sizes, modification times and
input size; it is written under a temporary name and renamed, carries checksums, and a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from deit_fast.data.archive import source_key
from deit_fast.data.memory import physical_memory
from deit_fast.data.scan import SPLITS, Findings, Place, Scan, few
from deit_fast.errors import DataError

CACHE_FORMAT = 1  # raise it when decoding changes, so that older caches are not taken for current ones


@dataclass(frozen=True)
class Contents:
    """A source as arrays, for each split in order of class and file name: M labels int64, and M rows of each of

    - images (3, S, S) uint8, if the pixels are kept;
    - names (bytes, below the source), digests (16,) uint8, sums (2, 3) int64 of every channel's values and their
      squares, sizes (2,) int32, the files' own heights and widths, if they are not.
    """

    arrays: dict[str, np.ndarray]  # "train_images", "train_labels", "test_images", ...
    findings: Findings


def load_folder(path: Path, input_size: int, skip_bad_images: bool, log: Callable[[str], None]) -> Contents:
    """The decoded folder or archive, from the cache if it is current; DataError if it is not a usable data set."""
    return _load(path, input_size, "", decode_folder, skip_bad_images, log)


def index_folder(path: Path, input_size: int, skip_bad_images: bool, log: Callable[[str], None]) -> Contents:
    """The indexed directory, from the cache if it is current; DataError if it is not a usable data set."""
    return _load(path, input_size, "index-", scan_folder, skip_bad_images, log)


def _load(path: Path, input_size: int, kind: str, make: Callable[[Path, int], Contents], skip_bad_images: bool,
          log: Callable[[str], None]) -> Contents:
    if not path.exists():
        raise DataError(f"{path}: no such file or directory. Give an existing one with --data-path.")
    key = hashlib.sha256(f"{CACHE_FORMAT} {source_key(path)}".encode()).hexdigest()[:32]
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.resolve().name)
    cache = cache_dir() / f"{stem}-{input_size}px-{kind}{key}.npz"
    contents = _read_cache(cache, log)
    if contents is None:
        log(f"decoding {path} to {input_size} pixels (once; kept in {cache.parent})")
        start = time.perf_counter()
        contents = make(path, input_size)
        log(f"decoded {_count(contents):,} images in {time.perf_counter() - start:.1f} s")
        if not contents.findings.bad or skip_bad_images:
            _write_cache(cache, contents, log)
    bad = contents.findings.bad
    if bad and not skip_bad_images:
        raise DataError(
            f"{path}: {len(bad)} of {len(bad) + _count(contents)} images cannot be decoded: {few(bad)}. Replace them, "
            "or pass --skip-bad-images to train without them."
        )
    return contents


def _count(contents: Contents) -> int:
    return sum(len(contents.arrays[f"{split}_labels"]) for split in SPLITS)


def cache_dir() -> Path:
    """Where decoded data sets are kept."""
    return Path(os.environ.get("DEIT_FAST_CACHE") or Path("~/.cache/deit_fast").expanduser())


def decode_folder(path: Path, input_size: int) -> Contents:
    """The pixels of a folder or archive; DataError if its layout or content cannot be a data set."""
    images: dict[Place, np.ndarray] = {}
    scan, total_bytes, memory = Scan(path, input_size), 0, physical_memory()
    for place, pixels, _ in scan:
        total_bytes += pixels.nbytes
        images[place] = pixels
        if 2 * total_bytes > memory:  # once as pieces, once as the array
            remedy = "--data-loading stream" if path.is_dir() else "a directory with --data-loading stream"
            raise DataError(
                f"{path}: more than {len(images):,} images of {input_size} pixels do not fit into this machine's "
                f"memory ({memory / 2**30:.1f} GiB). Use {remedy}, lower --input-size, or use fewer images."
            )
    findings = scan.findings()
    arrays = _labels(findings, images)
    for split in SPLITS:
        members = sorted(place for place in images if place[0] == split)
        arrays[f"{split}_images"] = np.empty((len(members), 3, input_size, input_size), np.uint8)
        for row, place in enumerate(members):
            arrays[f"{split}_images"][row] = images.pop(place)  # frees the piece as the array fills
    return Contents(arrays, findings)


def scan_folder(path: Path, input_size: int) -> Contents:
    """The index of a directory; DataError if its layout or content cannot be a data set."""
    facts: dict[Place, tuple[bytes, np.ndarray, tuple[int, int]]] = {}
    scan = Scan(path, input_size)
    for place, pixels, own_size in scan:
        values = pixels.reshape(3, -1)
        squares = np.square(values, dtype=np.uint16)
        sums = np.stack([values.sum(1, dtype=np.int64), squares.sum(1, dtype=np.int64)])
        facts[place] = hashlib.blake2b(pixels, digest_size=16).digest(), sums, own_size
    findings = scan.findings()
    arrays = _labels(findings, facts)
    for split in SPLITS:
        members = sorted(place for place in facts if place[0] == split)
        arrays[f"{split}_names"] = np.array([os.fsencode(name) for _, _, name in members])
        digests = b"".join(facts[place][0] for place in members)
        arrays[f"{split}_digests"] = np.frombuffer(digests, np.uint8).reshape(-1, 16)
        arrays[f"{split}_sums"] = np.stack([facts[place][1] for place in members])
        arrays[f"{split}_sizes"] = np.array([facts[place][2] for place in members], np.int32)
    return Contents(arrays, findings)


def _labels(findings: Findings, places: dict[Place, object]) -> dict[str, np.ndarray]:
    """The labels of both splits, in order of class and file name."""
    number = {name: i for i, name in enumerate(findings.classes)}
    ordered = sorted(places)
    return {f"{split}_labels": np.array([number[place[1]] for place in ordered if place[0] == split], np.int64)
            for split in SPLITS}  # fmt: skip


def _read_cache(path: Path, log: Callable[[str], None]) -> Contents | None:
    """What the cache file holds, or None if there is none or it is damaged (said in the log)."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # all checksums: np.load stops where a damaged header says so
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        with np.load(path, allow_pickle=False) as stored:
            meta = json.loads(str(stored["meta"]))
            arrays = {name: stored[name] for name in stored.files if name != "meta"}
        lists = {name: tuple(meta[name]) for name in ("classes", "bad", "ignored")}
        return Contents(arrays, Findings(**lists, **{name: meta[name] for name in ("small_jpegs", "own_validation")}))
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        log(f"the decoded copy {path} is damaged ({error}); decoding again")
        return None


def _write_cache(path: Path, contents: Contents, log: Callable[[str], None]) -> None:
    """Writes the cache file whole or not at all; a full or read-only disk costs the next run time, nothing else."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, meta=np.array(json.dumps(asdict(contents.findings))), **contents.arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        log(f"the decoded copy could not be kept in {path.parent} ({error}); set DEIT_FAST_CACHE to a writable folder")
        if temporary is not None:
            temporary.unlink(missing_ok=True)
