"""Directories and archives: every kind of source gives the same pixels, and every kind of damage is named."""

import io
import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from deit_fast.data import archive, folder
from deit_fast.data.datasets import load_dataset
from deit_fast.errors import DataError

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("DEIT_FAST_CACHE", str(path))
    return path


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
    pixels, what = folder._decode(("x", content, size))
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


@pytest.mark.parametrize("shape, size", [((48, 40), 32), ((20, 33), 32), ((32, 50), 32), ((90, 111), 64), ((64, 80), 64)])
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
    monkeypatch.setattr(folder, "THREADED_BYTES", 0)
    monkeypatch.setattr(folder, "BATCH_FILES", 5)
    threaded = folder.decode_folder(root, 64)
    assert all(np.array_equal(inline.images[s], threaded.images[s]) for s in folder.SPLITS)


def fails(path, *words, **options):
    with pytest.raises(DataError) as error:
        load(path, **options)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


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
    for split in folder.SPLITS:
        (root / split / "fox").mkdir()
    fails(root, "no images in test/fox, train/fox")
    empty = [tarfile.TarInfo(f"{split}/fox") for split in folder.SPLITS]
    for member in empty:
        member.type = tarfile.DIRTYPE
    fails(write_tar(tmp_path / "set.tar", make_files(), empty), "no images in test/fox, train/fox")


def test_other_files_are_left_out_and_counted(tmp_path):
    data = load(write_directory(tmp_path / "set", make_files() | {"train/cat/a.txt": b"", "train/b.txt": b"", "c.txt": b""}))
    assert len(data.train) == 12 and any("2 files that are no images" in note for note in data.notes)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("source", ["tar", "tar.gz", "zip"])
def test_truncated_archives_never_pass(tmp_path, source, share):
    path = SOURCES[source](tmp_path, make_files())
    size = path.stat().st_size
    os.truncate(path, int(size * share) if source != "tar" else int((size - 9 * 1024) * share))  # tar pads with zeros
    fails(path, path.name, "truncated or corrupt", "again")


def test_tar_cut_between_two_members_does_not_pass(tmp_path):
    path = SOURCES["tar"](tmp_path, make_files())
    with tarfile.open(path) as tar:
        os.truncate(path, tar.getmembers()[9].offset)
    fails(path, "truncated or corrupt", "no end mark")


@pytest.mark.parametrize("source", ["tar.gz", "zip"])
def test_flipped_bytes_in_compressed_data_do_not_pass(tmp_path, source):
    path = SOURCES[source](tmp_path, make_files())
    good = path.read_bytes()
    for share in (0.2, 0.5, 0.8):
        bad = bytearray(good)
        bad[int(len(bad) * share)] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(DataError):  # a damaged archive, or images that cannot be decoded
            load(path)


def test_gzip_checksum_is_compared(tmp_path):
    files = make_files() | {"notes.bin": np.random.default_rng(0).bytes(1 << 18)}
    path = SOURCES["tar.gz"](tmp_path, files)
    bad = bytearray(path.read_bytes())
    bad[-6] ^= 1  # a byte of the checksum, 8 bytes before the end
    path.write_bytes(bad)
    fails(path, "truncated or corrupt", "CRC")


def test_damaged_tar_header_does_not_end_the_set(tmp_path):
    path = SOURCES["tar"](tmp_path, make_files())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[9].offset
    bad = bytearray(path.read_bytes())
    bad[offset + 5] ^= 0x10
    path.write_bytes(bad)
    fails(path, "truncated or corrupt")


def tar_member(name, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("member", [
    tar_member("/train/cat/x.png"), tar_member("../train/cat/x.png"), tar_member("train/../../x.png"),
    tar_member("C:\\x.png"), tar_member("train/cat/x.png", tarfile.SYMTYPE, "/etc/passwd"),
    tar_member("train/cat/x.png", tarfile.LNKTYPE, "train/cat/000.png"), tar_member("train/cat/x.png", tarfile.FIFOTYPE),
])  # fmt: skip
def test_members_that_leave_the_archive_are_refused(tmp_path, member):
    why = "leads out" if member.isreg() else "is a link or a device"
    fails(write_tar(tmp_path / "set.tar", make_files(), [member]), "set.tar", "x.png", why)


@pytest.mark.parametrize("name, mode", [("../x.png", 0), ("/x.png", 0), ("train/cat/x.png", stat.S_IFLNK | 0o777)])
def test_zip_members_that_leave_the_archive_are_refused(tmp_path, name, mode):
    path = write_zip(tmp_path / "set.zip", make_files())
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    with zipfile.ZipFile(path, "a") as zip:
        zip.writestr(member, "/etc/passwd")
    fails(path, "set.zip", "x.png", "is a link" if mode else "leads out")


def test_directory_links_are_followed_but_not_in_circles(tmp_path):
    root = write_directory(tmp_path / "set", make_files())
    (root / "train/cat").rename(tmp_path / "elsewhere")
    (root / "train/cat").symlink_to(tmp_path / "elsewhere")
    assert len(load(root).train) == 12
    (root / "train/dog/loop").symlink_to(root)
    fails(root, "loop", "link")


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
    monkeypatch.setattr(folder, "_physical_memory", lambda: 50_000)
    fails(write_directory(tmp_path / "set", make_files()), "do not fit", "--input-size")


def test_unwanted_members_are_never_read(tmp_path):
    path = write_zip(tmp_path / "set.zip", make_files())
    names = [name for name, _ in archive.read_entries(path, lambda name: name.startswith("test/dog"))]
    assert names == ["test/dog/000.png", "test/dog/001.png"]


def test_statistics_come_from_the_train_split_alone(tmp_path):
    files = {name: encode(np.full((32, 32, 3), 255 if "test" in name else 51, np.uint8)) for name in make_files()}
    data = load(write_directory(tmp_path / "set", files), val_split=0.25)
    assert torch.allclose(torch.tensor(data.mean), torch.tensor([0.2] * 3)) and min(data.std) > 0
    assert any("computed from its train split" in note for note in data.notes)
