"""Files that are either the old ones or the new ones, never half of each.

`os.replace` within one folder is atomic for everyone who opens the file afterwards, but the kernel may put the
rename on the disk before the data. So the order is: write under a temporary name in the same folder, flush, fsync the
file, rename, fsync the folder. A crash at any point leaves the old file whole; a run killed in the middle may leave
`.<name>.*.tmp` behind, which nothing reads and `remove_leftovers` clears away. The price is one fsync per file:
milliseconds on a local disk, paid once per epoch and per checkpoint interval.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from deit_fast.errors import CheckpointError

_REMEDIES = {
    errno.ENOSPC: "free space on that disk or choose another folder",
    errno.EDQUOT: "free space in your quota or choose another folder",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder",
    errno.EACCES: "make the folder writable or choose another folder",
    errno.EPERM: "make the folder writable or choose another folder",
    errno.EROFS: "choose a folder on a writable disk",
    errno.EEXIST: "a file has the folder's name; remove it or choose another folder",
    errno.ENOTDIR: "choose a folder whose parents are folders, not files",
    errno.EISDIR: "remove the folder of that name or choose another one",
}


class _RememberingFile:
    """A file that keeps the OSError of a failed write.

    `torch.save` turns an error of the file under it into a RuntimeError about positions in a zip archive
    ("unexpected pos 704 vs 598"); the user needs "No space left on device".
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()


def atomic_write(path: str | os.PathLike[str], writer: Callable[[BinaryIO], object]) -> None:
    """Writes what `writer(file)` writes to `path`, completely or not at all; `file` is open for bytes.

    Makes missing folders. A symbolic link stays one: its target is replaced. Any OSError becomes a CheckpointError
    with the path and a remedy; an exception of `writer` itself passes through. In both cases the old file survives
    and the temporary file is removed.
    """
    asked = Path(path)
    target = Path(os.path.realpath(asked))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, writer)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "check the disk or choose another folder")
        reason = error.strerror or str(error)
        kept = "The file that was there before is unchanged" if target.is_file() else "Nothing was written"
        raise CheckpointError(f"could not write {asked}: {reason}. {kept}; {remedy}.") from error


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed writes left in `folder`; no other process may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _replace(target: Path, writer: Callable[[BinaryIO], object]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            remembering = _RememberingFile(file)
            try:
                writer(remembering)
            except RuntimeError as error:
                if remembering.error is not None:
                    raise remembering.error from error
                raise
            file.flush()
            os.fchmod(file.fileno(), _mode(target))
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:  # also a KeyboardInterrupt: no temporary file may stay
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _mode(target: Path) -> int:
    """Returns the permission bits of the old file, or what `open` would give a new one (mkstemp gives 0600)."""
    if target.is_file():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
