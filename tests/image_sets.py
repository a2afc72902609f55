"""Small data sets as directories and archives, for the tests of what reads them."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from deit_fast.data.datasets import load_dataset
from deit_fast.errors import DataError

CLASSES = ("cat", "dog", "emu")


def encode(pixels, format="PNG", mode=None, **options):
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, format, **options)
    return file.getvalue()


def pixels_of(seed, size=32):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def make_files(train=4, test=2, size=32, format="PNG"):
    """name -> content of a small data set; image i of class c has the pixels of seed 100 c + i (+ 50 in test)."""
    return {
        f"{split}/{name}/{i:03}.{format.lower()}": encode(pixels_of(100 * c + i + offset, size), format)
        for c, name in enumerate(CLASSES)
        for split, count, offset in (("train", train, 0), ("test", test, 50))
        for i in range(count)
    }


def write_directory(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_tar(path, files, extra=()):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as zip:
        for name, content in files.items():
            zip.writestr(name, content)
    return path


def prefixed(prefix, files):
    return {prefix + name: content for name, content in files.items()}


def load(path, val_split=0.0, log=lambda text: None, **options):
    return load_dataset("folder", path, val_split=val_split, log=log, **options)


SOURCES = {
    "directory": lambda tmp, files: write_directory(tmp / "set", files),
    "tar": lambda tmp, files: write_tar(tmp / "set.tar", files),
    "tar.gz": lambda tmp, files: write_tar(tmp / "set.tar.gz", files),
    "zip": lambda tmp, files: write_zip(tmp / "set.zip", files),
    "wrapped": lambda tmp, files: write_tar(tmp / "set.tgz", prefixed("./images/", files)),
    "wrapped-directory": lambda tmp, files: write_directory(tmp / "set", prefixed("images/", files)),
    "any-order": lambda tmp, files: write_zip(tmp / "set.zip", dict(reversed(files.items()))),
    "mac": lambda tmp, files: write_zip(
        tmp / "set.zip", files | {"__MACOSX/train/cat/._0.png": b"", "train/.DS_Store": b"x", "train/cat/.x.png": b"x"}
    ),
}


def fails(path, *words, **options):
    with pytest.raises(DataError) as error:
        load(path, **options)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
