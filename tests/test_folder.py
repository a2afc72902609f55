"""Directories and archives of images: every kind of source gives the same pixels, every fault is named."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from image_sets import (
    CLASSES, SOURCES, encode, fails, load, make_files, pixels_of, prefixed, write_directory, write_tar, write_zip,
)  # fmt: skip
from PIL import Image

from deit_fast.data import folder, scan
from deit_fast.data.datasets import load_dataset
from deit_fast.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("DEIT_FAST_CACHE", str(path))
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_pixels_labels_and_order_are_those_of_the_files(tmp_path, source):
    data = load(SOURCES[source](tmp_path, make_files()))
    assert data.classes == CLASSES and data.val is None and data.flips
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for split, count, offset in ((data.train, 4, 0), (data.test, 2, 50)):
        expected = [pixels_of(100 * c + i + offset).transpose(2, 0, 1) for c in range(3) for i in range(count)]
        assert np.array_equal(split.images.numpy(), np.stack(expected))
    assert data.fingerprint == load(write_directory(tmp_path / "plain", make_files())).fingerprint


def test_cache_serves_until_the_source_changes(tmp_path, cache, monkeypatch):
    calls = []
    decode = folder.decode_folder
    monkeypatch.setattr(folder, "decode_folder", lambda *a: calls.append(a) or decode(*a))
    root = write_directory(tmp_path / "set", make_files())
    first = load(root)
    assert load(root).fingerprint == first.fingerprint and len(calls) == 1
    load(root, input_size=16)
    assert len(calls) == 2
    (root / "train/cat/000.png").write_bytes(encode(pixels_of(7)))
    assert load(root).fingerprint != first.fingerprint and len(calls) == 3
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "shape", "foreign", "empty"])
def test_damaged_cache_is_rebuilt(tmp_path, cache, damage):
    root = write_directory(tmp_path / "set", make_files())
    first, messages = load(root), []
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    shape = file.read_bytes().replace(b"(12, 3,", b"(10, 3,")  # an array that ends early, before its checksum
    half = content[: len(content) // 2]
    damaged = {"truncated": half, "flipped": content, "shape": shape, "foreign": b"no archive", "empty": b""}
    file.write_bytes(damaged[damage])
    again = load(root, log=messages.append)
    assert again.fingerprint == first.fingerprint and any("damaged" in text for text in messages)
    messages.clear()
    load(root, log=messages.append)
    assert not messages


def test_unwritable_cache_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path / "file" / "below"))
    messages = []
    data = load(write_directory(tmp_path / "set", make_files()), log=messages.append)
    assert len(data.train) == 12 and any("DEIT_FAST_CACHE" in text for text in messages)


def decoded(content, size=32):
    pixels, what, _ = scan.decode(content, size)
    assert pixels is not None, what
    return pixels.transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_every_mode_becomes_rgb(mode):
    content = encode(pixels_of(1), mode=mode)
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_cmyk_and_sixteen_bits_become_rgb():
    grey = np.full((32, 32, 3), 90, np.uint8)
    assert abs(decoded(encode(grey, "JPEG", mode="CMYK")).astype(int) - 90).max() <= 2
    deep = (np.arange(1024).reshape(32, 32) * 64).astype(np.uint16)
    assert np.array_equal(decoded(encode(deep))[..., 1], deep >> 8)


SHAPES = [((48, 40), 32), ((20, 33), 32), ((32, 50), 32), ((90, 111), 64), ((64, 80), 64)]


@pytest.mark.parametrize("shape, size", SHAPES)
def test_other_sizes_are_scaled_and_cut_as_torchvision_does(shape, size):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    steps = [Resize(int(size / 0.875) if size >= 64 else size, InterpolationMode.BICUBIC), CenterCrop(size)]
    assert np.array_equal(decoded(encode(pixels), size), np.asarray(Compose(steps)(Image.fromarray(pixels))))


def test_the_right_size_is_taken_as_it_is():
    assert np.array_equal(decoded(encode(pixels_of(3, 64)), 64), pixels_of(3, 64))


def test_large_files_are_decoded_by_threads_alike(tmp_path, monkeypatch):
    root = write_directory(tmp_path / "set", make_files(size=80))
    inline = folder.decode_folder(root, 64)
    monkeypatch.setattr(scan, "THREADED_BYTES", 0)
    monkeypatch.setattr(scan, "BATCH_FILES", 5)
    threaded = folder.decode_folder(root, 64)
    assert all(np.array_equal(inline.arrays[name], threaded.arrays[name]) for name in inline.arrays)


def test_missing_and_foreign_sources_are_named(tmp_path):
    fails(tmp_path / "gone", "gone", "no such file", "--data-path")
    (tmp_path / "a.txt").write_text("x")
    fails(tmp_path / "a.txt", "a.txt", "neither a directory nor an archive")
    (tmp_path / "b.tar.gz").write_text("x" * 2000)
    fails(tmp_path / "b.tar.gz", "b.tar.gz", "truncated or corrupt")
    (tmp_path / "c.zip").write_text("x" * 2000)
    fails(tmp_path / "c.zip", "c.zip", "truncated or corrupt")
    fails(None, "--data-path")


@pytest.mark.parametrize("change, words", [
    (lambda f: f.clear(), ("train/", "nothing", "Expected train/<class>")),
    (lambda f: [f.pop(n) for n in list(f) if n.startswith("test")], ("under test/", "at the top: train")),
    (lambda f: f.update({"train/fox/1.png": encode(pixels_of(0))}), ("different classes", "only in train: fox")),
    (lambda f: f.update({"test/fox/1.png": encode(pixels_of(0))}), ("different classes", "only in test: fox")),
    (lambda f: f.update({"train/1.png": encode(pixels_of(0))}), ("train/1.png", "no class folder")),
    (lambda f: [f.pop(n) for n in list(f) if "/cat/" not in n], ("one class only (cat)",)),
    (lambda f: f.update(prefixed("more/", f)), ("several folders hold splits", "more")),
    (lambda f: f.update({"train/fox/a.txt": b"", "test/fox/a.txt": b""}), ("no images in test/fox, train/fox",)),
])  # fmt: skip
@pytest.mark.parametrize("source", ["directory", "tar.gz", "zip"])
def test_wrong_layout_is_named(tmp_path, source, change, words):
    files = make_files()
    change(files)
    (tmp_path / "set").mkdir()
    fails(SOURCES[source](tmp_path, files), *words)


def test_empty_class_folders_are_named(tmp_path):
    root = write_directory(tmp_path / "set", make_files())
    for split in scan.SPLITS:
        (root / split / "fox").mkdir()
    fails(root, "no images in test/fox, train/fox")
    empty = [tarfile.TarInfo(f"{split}/fox") for split in scan.SPLITS]
    for member in empty:
        member.type = tarfile.DIRTYPE
    fails(write_tar(tmp_path / "set.tar", make_files(), empty), "no images in test/fox, train/fox")


def test_other_files_are_left_out_and_counted(tmp_path):
    files = make_files() | {"train/cat/a.txt": b"", "train/b.txt": b"", "c.txt": b""}
    data = load(write_directory(tmp_path / "set", files))
    assert len(data.train) == 12 and any("2 files that are no images" in note for note in data.notes)


def test_directory_links_are_followed_but_not_in_circles(tmp_path):
    root = write_directory(tmp_path / "set", make_files())
    (root / "train/cat").rename(tmp_path / "elsewhere")
    (root / "train/cat").symlink_to(tmp_path / "elsewhere")
    assert len(load(root).train) == 12
    (root / "train/dog/loop").symlink_to(root)
    fails(root, "loop", "link")


def test_what_is_no_ordinary_file_is_named(tmp_path):
    root = write_directory(tmp_path / "set", make_files())
    os.symlink("nowhere", root / "train/cat/x.png")
    fails(root, "train/cat/x.png", "broken link")
    (root / "train/cat/x.png").unlink()
    os.mkfifo(root / "train/cat/x.png")  # reading it would wait for ever
    fails(root, "train/cat/x.png", "no ordinary file")


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_a_validation_folder_is_not_passed_over_in_silence(tmp_path, prefix):
    files = prefixed(prefix, make_files() | {"val/cat/1.png": b""})
    path = write_zip(tmp_path / "set.zip", files)
    for _ in range(2):  # decoded, then from the cache
        assert any("own validation" in note for note in load(path).notes)


def test_a_line_of_pixels_is_a_bad_image(tmp_path):
    files = make_files() | {"train/cat/x.png": encode(np.zeros((5000, 1, 3), np.uint8))}
    fails(write_directory(tmp_path / "set", files), "train/cat/x.png", "1 x 5000", input_size=224)


def test_bad_images_are_named_or_skipped_and_counted(tmp_path):
    files = make_files()
    files["train/cat/001.png"] = files["train/cat/001.png"][:700]
    files["test/emu/000.png"] = b"not an image"
    path = write_tar(tmp_path / "set.tar.gz", files)
    fails(path, "2 of 18 images", "train/cat/001.png", "test/emu/000.png", "--skip-bad-images")
    for _ in range(2):  # decoded, then from the cache
        data = load(path, skip_bad_images=True)
        assert (len(data.train), len(data.test)) == (11, 5)
        assert data.train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 4
        assert any("2 images that cannot be decoded" in note for note in data.notes)
    fails(path, "2 of 18 images")  # what was skipped once is not forgotten


def test_a_class_of_bad_images_only_cannot_be_skipped(tmp_path):
    files = {name: b"x" if "test/dog" in name else content for name, content in make_files().items()}
    fails(write_zip(tmp_path / "set.zip", files), "no images in test/dog", "2 files", skip_bad_images=True)


@pytest.mark.parametrize("format, size, warns", [("JPEG", 32, True), ("PNG", 32, False), ("JPEG", 64, False)])
def test_small_jpegs_are_warned_of(tmp_path, format, size, warns):
    data = load(write_directory(tmp_path / "set", make_files(size=size, format=format)))
    assert any("18 of 18 images are JPEG" in note for note in data.notes) == warns
    assert data.name == "folder:set"


def test_a_set_that_cannot_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "physical_memory", lambda: 50_000)
    fails(write_directory(tmp_path / "set", make_files()), "do not fit", "--input-size")


def test_statistics_come_from_the_train_split_alone(tmp_path):
    files = {name: encode(np.full((32, 32, 3), 255 if "test" in name else 51, np.uint8)) for name in make_files()}
    data = load(write_directory(tmp_path / "set", files), val_split=0.25)
    assert torch.allclose(torch.tensor(data.mean), torch.tensor([0.2] * 3)) and min(data.std) > 0
    assert any("computed from its train split" in note for note in data.notes)


def test_a_name_of_ones_own(tmp_path):
    path = write_directory(tmp_path / "set", make_files())
    own, named = load(path), load(path, name="Three greys (JPEG copy)")
    assert own.name == "folder:set" and named.name == "Three greys (JPEG copy)"
    assert named.fingerprint == own.fingerprint and any("Three greys" in note for note in named.notes)
    with pytest.raises(DataError, match="--data-name is for --data-set folder; digits has a name"):
        load_dataset("digits", name="Three greys")
