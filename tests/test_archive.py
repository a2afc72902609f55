"""Damaged and hostile archives: none passes as a smaller data set, no member may leave its archive."""

import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from image_sets import SOURCES, fails, load, make_files, write_tar, write_zip

from deit_fast.data import archive
from deit_fast.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("DEIT_FAST_CACHE", str(path))
    return path


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
    tar_member("train/cat/x.png", tarfile.LNKTYPE, "train/cat/000.png"),
    tar_member("train/cat/x.png", tarfile.FIFOTYPE),
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


def test_unwanted_members_are_never_read(tmp_path):
    path = write_zip(tmp_path / "set.zip", make_files())
    names = [name for name, _ in archive.read_entries(path, lambda name: name.startswith("test/dog"))]
    assert names == ["test/dog/000.png", "test/dog/001.png"]
