"""Reading a directory, tar or zip file member by member, without trusting it.

Nothing is ever extracted to disk: a member's bytes go from the archive straight to the image decoder. A member whose
name leaves the archive (absolute, `..`, a link) can therefore do no harm here, but it is refused all the same, because
an archive that holds one is not what its user believes it to be.

A damaged archive must not pass as a smaller data set. `tarfile` ends quietly at a damaged header or at an end of file
between two members, and never reads far enough to compare gzip's checksum, so this module demands the end mark
of the format (a block of zeros) and reads on to the end of the stream, where the decompressor checks its sum.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from deit_fast.errors import DataError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, ".zip")
Entry = tuple[str, bytes | None]


def is_archive(path: Path) -> bool:
    """True if the name of `path` is that of an archive which `read_entries` can read."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def read_entries(path: Path, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    """Yields (name, content) of every wanted file and (name, None) of every wanted folder; names use `/`.

    `wanted` is asked by name before anything is read. Raises DataError for a missing, damaged or unsafe source.
    """
    if path.is_dir():
        return _read_directory(path, wanted)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory. Give an existing one with --data-path.")
    if not is_archive(path):
        raise DataError(
            f"{path}: neither a directory nor an archive ({', '.join(ARCHIVE_SUFFIXES)}). "
            "Give the folder that holds train/ and test/, or an archive of it."
        )
    return _read_zip(path, wanted) if path.name.lower().endswith(".zip") else _read_tar(path, wanted)


def source_key(path: Path) -> str:
    """A hash that changes when the source does: size and time of an archive, or of every file in a directory."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    files = _walk(path) if path.is_dir() else [(path.name, path)]
    for name, file in files:
        if file.is_file():
            status = file.stat()
            digest.update(f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def names_below(root: Path) -> Iterator[str]:
    """The relative names of every folder and file below a directory, without reading any."""
    return (name for name, _ in _walk(root))


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields (relative name, path) of every folder and file below root, in a fixed order; follows links to folders."""
    ancestors: dict[str, tuple[int, int]] = {}  # folder -> identity, to notice a link back to a folder above
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        above = [str(parent) for parent in Path(folder).parents]
        if any(ancestors.get(parent) == identity for parent in above):
            raise DataError(f"{folder}: a link back to a folder that contains it. Remove the link.")
        ancestors[folder] = identity
        folders.sort()
        relative = Path(folder).relative_to(root)
        for name in [*folders, *sorted(files)]:
            yield (relative / name).as_posix(), Path(folder, name)


def _read_directory(root: Path, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    for name, path in _walk(root):
        if not wanted(name):
            continue
        if path.is_dir():
            yield name, None
            continue
        if not path.is_file():  # a pipe would block for ever
            raise DataError(f"{path}: a broken link, or no ordinary file. Remove it.")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}). Remove it or make it readable.") from error
        yield name, content


def _safe_name(path: Path, name: str) -> str:
    """The member's name without a leading `./`; DataError if it leads out of the archive."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or parts[0].endswith(":"):
        raise DataError(
            f"{path}: member {name!r} leads out of the archive (absolute, or with '..'). "
            "Nothing was read; make the archive again with relative names, or get it from a source that you trust."
        )
    return "/".join(part for part in parts if part not in ("", "."))


def _refuse_link(path: Path, name: str) -> None:
    raise DataError(
        f"{path}: member {name!r} is a link or a device, not an ordinary file. "
        "Make the archive again with the files themselves (tar --dereference --hard-dereference)."
    )


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: the archive is truncated or corrupt ({why}). Copy or download it again.")


def _read_tar(path: Path, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = _safe_name(path, member.name)
                if not (member.isfile() or member.isdir()):
                    _refuse_link(path, member.name)
                if not wanted(name):
                    continue
                yield name, None if member.isdir() else archive.extractfile(member).read()
            stream = archive.fileobj
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise _damaged(path, f"no end mark after byte {archive.offset:,} of the unpacked data")
            while stream.read(1 << 20):  # to the end, where gzip, bzip2 and xz check their sums
                pass
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _read_zip(path: Path, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = _safe_name(path, member.filename)
                mode = member.external_attr >> 16  # Unix mode; 0 when the archive comes from elsewhere
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    _refuse_link(path, member.filename)
                if not wanted(name):
                    continue
                if member.flag_bits & 1:
                    raise DataError(f"{path}: member {member.filename!r} is encrypted. Unpack the archive yourself.")
                yield name, None if member.is_dir() else archive.read(member)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
