"""csrc/cuda on a CPU: its sources and bindings compiled by g++ against the two headers of this folder, as an extension.

`augment` is the op with backend "cuda", on CPU tensors. `schedule` chooses among the results that a GPU may give; a
correct kernel gives the same in all of them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
import torch
from torch import Tensor

from deit_fast.data.plan import Plan
from deit_fast.kernels.augment_args import pack, workspace
from deit_fast.reference.augment import output_size

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
         "-Wno-unknown-pragmas"]
SCHEDULES = ("ascending early", "ascending late", "descending early", "descending late")
_folder = tempfile.TemporaryDirectory()  # lives as long as the process


def why_not() -> str | None:
    """Why this cannot be built here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


@cache
def module() -> ModuleType:
    """The extension, compiled once in a process; CUDA_ON_HOST_FLAGS adds flags, such as -fsanitize=address."""
    name = "_cuda_on_host"
    extra = os.environ.get("CUDA_ON_HOST_FLAGS", "").split()
    includes = [f"-I{path}" for path in (HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    objects = []
    for source, checks in ((HERE / "module.cpp", ["-fsanitize=alignment"]), (CSRC / "cuda" / "bindings.cpp", [])):
        objects.append(Path(_folder.name, source.stem + ".o"))
        subprocess.run(["g++", *FLAGS, *checks, *extra, f"-DDEIT_FAST_MODULE={name}", *includes, "-c", source, "-o",
                        objects[-1]], check=True)
    library = Path(_folder.name, name + ".so")
    subprocess.run(["g++", "-shared", *extra, *objects, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location(name, library)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@contextmanager
def schedule(words: str) -> Iterator[None]:
    """Threads "ascending" or "descending" between barriers, asynchronous copies "early" or "late"."""
    os.environ["CUDA_ON_HOST"] = words
    try:
        yield
    finally:
        del os.environ["CUDA_ON_HOST"]


@contextmanager
def beginning_at(row: int, rows: int) -> Iterator[None]:
    """Of every grid, which has the same number of blocks for each of `rows`, the blocks from that row on."""
    os.environ["CUDA_ON_HOST_BEGIN"] = f"{row}/{rows}"
    try:
        yield
    finally:
        del os.environ["CUDA_ON_HOST_BEGIN"]


def augment(images: Tensor, labels: Tensor, plan: Plan, mean: Sequence[float], std: Sequence[float], num_classes: int,
            size: int | tuple[int, int] | None = None, smoothing: float = 0.0, dtype: torch.dtype = torch.float32,
            channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """As `ops.augment`, without its checks; whatever the kernel leaves unwritten is NaN."""
    (B, *_), (height, width) = plan.index.shape, output_size(images, size)
    out = torch.full((B, height, width, 3) if channels_last else (B, 3, height, width), torch.nan, dtype=dtype)
    out = out.permute(0, 3, 1, 2) if channels_last else out
    targets = torch.full((B, num_classes), torch.nan)
    tensors = list(plan.tensors().values())
    if B:
        arguments, _kept = pack(images, labels, tensors, plan.remode, plan.padding_mode, mean, std, num_classes, height,
                                width, smoothing, dtype, channels_last, out, targets)
        space = workspace(module(), images, tensors, out, B)
        module().augment_fwd(*arguments, space.data_ptr(), 0, 0)
    return out, targets
