"""CIFAR-10 and CIFAR-100 through torchvision's reader, with a download that cannot hang.

torchvision checks the files by MD5, but its download sets no time limit: without a network, or behind one that swallows
packets, it would wait for minutes. So the host is asked first, in a thread (a name look-up has no time limit of its
own), and every later wait for bytes is bounded: 4 + 5 seconds at most until the user is told what to do.
"""

from __future__ import annotations

import socket
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from queue import Empty, Queue
from urllib.request import Request, urlopen

import torch

from deit_fast.data.split import Split
from deit_fast.errors import DataError

CIFAR = {  # torchvision's class, published mean and std of the train set's pixels
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
PROBE_SECONDS = 4.0  # for the host to answer at all
STALL_SECONDS = 5.0  # without a byte during a download
Cifar = tuple[tuple[str, ...], Split, Split, tuple[float, ...], tuple[float, ...]]


def load_cifar(name: str, path: Path | None, download: bool, log: Callable[[str], None]) -> Cifar:
    """Class names, train, test, published mean and std of `name` in the folder path, downloaded there if need be."""
    import torchvision
    from torchvision.datasets.utils import check_integrity

    kind_name, mean, std = CIFAR[name]
    kind = getattr(torchvision.datasets, kind_name)
    root = path or Path("data")
    if root.is_file():
        raise DataError(f"{root}: --data-set {name} needs a folder. For an archive of images pass --data-set folder.")
    if root.name == kind.base_folder:
        root = root.parent
    try:
        splits = _read_cifar(kind, root)
    except RuntimeError:  # torchvision's word for absent or damaged
        damaged = "damaged" if (root / kind.base_folder).exists() else "not there"
        manual = f"Or put {kind.url} into {root} yourself, or use --data-set folder or --data-set digits."
        if not check_integrity(str(root / kind.filename), kind.tgz_md5):
            if not download:
                raise DataError(f"{name} is {damaged} in {root}, and --no-download is given. {manual}") from None
            why = unreachable(kind.url, PROBE_SECONDS)
            if why is not None:
                raise DataError(
                    f"{name} is {damaged} in {root} and cannot be downloaded ({why}). Connect to the network. {manual}"
                ) from None
            log(f"downloading {kind.url} to {root}")
        try:
            with socket_timeout(STALL_SECONDS):
                kind(str(root), train=True, download=True)
            splits = _read_cifar(kind, root)
        except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error, HTTPException) as error:
            raise DataError(f"{name} could not be downloaded to {root} ({error}). Try again. {manual}") from error
    return *splits, mean, std


def _read_cifar(kind: type, root: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Class names, train and test of torchvision's CIFAR class in root; RuntimeError if absent or damaged."""
    sets = [kind(str(root), train=train, download=False) for train in (True, False)]
    splits = [
        Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets, dtype=torch.int64))
        for s in sets
    ]
    return tuple(sets[0].classes), *splits


def unreachable(url: str, seconds: float) -> str | None:
    """None if `url` answers within `seconds`, else why not. In a thread, since a name look-up has no time limit."""
    answer: Queue[str | None] = Queue()

    def probe() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=seconds):
                answer.put(None)
        except (OSError, HTTPException, ValueError) as error:
            answer.put(str(error) or type(error).__name__)

    threading.Thread(target=probe, daemon=True).start()
    try:
        return answer.get(timeout=seconds)
    except Empty:
        return f"no answer within {seconds:g} s"


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Bounds every wait for bytes inside: torchvision's download sets no limit and would hang on a stalled host."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
