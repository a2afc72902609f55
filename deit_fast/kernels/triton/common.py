"""What all launchers share: when to refuse a call, how to launch, and how to see launches without a GPU.

A launcher chooses its tiles by shape and architecture alone, in one function per op, so that the hot path neither
measures nor waits and a CUDA graph can capture it. `recording()` collects the launches in place of making them: the
tests compile exactly the kernels that the launchers choose, on a machine without a GPU.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import InterpreterError
from triton.errors import TritonError

from deit_fast.backend import KernelError

from . import INTERPRETED, too_old

FAILED: dict[str, str] = {}  # op -> why Triton could not compile one of its kernels here


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its grid, and its arguments by name (constants and num_warps among them)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


HOPPER = 90
_recorded: list[Launch] | None = None
_recorded_for = HOPPER


@contextmanager
def recording(arch: int = HOPPER) -> Iterator[list[Launch]]:
    """Yields a list that collects the launches made inside, none of which runs: call launchers on `meta` tensors.

    arch: the architecture that they are meant for, as in sm_90.
    """
    global _recorded, _recorded_for
    before = _recorded, _recorded_for
    _recorded, _recorded_for = [], arch
    try:
        yield _recorded
    finally:
        _recorded, _recorded_for = before


def architecture(x: Tensor) -> int:
    """The architecture of x's GPU, as in sm_90; without a GPU the one that launches are recorded for."""
    return _architecture(x.device.index) if x.is_cuda else _recorded_for


@lru_cache
def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(op: str, kernel: Any, grid: int, x: Tensor, **arguments: Any) -> None:
    """Launches `grid` programs of a kernel on the current stream of x's device; no programs: no launch.

    A kernel that does not compile, or needs more shared memory than the GPU has, is remembered in FAILED, so that the
    op's why_not gives the reason from then on; this call raises KernelError, on which the automatic order steps down.
    """
    if grid == 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, (grid,), arguments))
        return
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        try:
            kernel[(grid,)](**arguments)
        except (TritonError, subprocess.CalledProcessError, RuntimeError) as error:
            if not _is_compile_error(error):
                raise
            FAILED[op] = f"Triton {triton.__version__} could not compile {kernel.__name__} here: {_first_line(error)}"
            raise KernelError(f"{op}: {FAILED[op]}.") from error


def _is_compile_error(error: BaseException) -> bool:
    """Whether the kernel cannot run here at all, which a defect met by the interpreter or by CUDA does not mean."""
    signs = ("PassManager", "C compiler", "LLVM")
    return not isinstance(error, (RuntimeError, InterpreterError)) or any(sign in str(error) for sign in signs)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refusal(op: str, x: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None,
            dtype: torch.dtype | None = None) -> str | None:
    """Why no Triton kernel of this op can take x with this dropout, or None.

    dtype: of the op's floats, where x is not of it.
    """
    dtype = x.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is not float32, float16 or bfloat16"
    if INTERPRETED:
        if dtype == torch.bfloat16:
            return ("Triton's interpreter multiplies bfloat16 bit patterns (triton-lang/triton issue 11584) and cuts "
                    "where a GPU rounds to it")
    elif not x.is_cuda:
        return f"the tensors are on {x.device}, Triton needs a CUDA GPU"
    elif (reason := too_old(x.device.index)) is not None:
        return reason
    if dropout_p > 0.0 and seed is None:
        return "dropout without a seed is PyTorch's own, which only reference draws"
    if dropout_p > 0.0 and keep_threshold(dropout_p) >= 2**32:
        return f"dropout_p={dropout_p} rounds to 1"
    return FAILED.get(op)


def dot_precision(x: Tensor) -> str:
    """How fp32 products are taken: "tf32" where torch's own matmul does so, else "ieee" (no effect on 16 bits)."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def keep_threshold(p: float) -> int:
    """The smallest random 32-bit word that keeps an element: round(p 2^32), 0 without dropout."""
    return round(p * 2**32)


def dropout_arguments(p: float, seed: Tensor | None) -> dict[str, Any]:
    """The kernel arguments of a dropout: seed, threshold and the factor 1 / (1 - p) of kept elements."""
    if p == 0.0:
        return {"seed_ptr": None, "THRESHOLD": 0, "KEEP_SCALE": 1.0}
    return {"seed_ptr": seed, "THRESHOLD": keep_threshold(p), "KEEP_SCALE": 1.0 / (1.0 - p)}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor contiguous, copied only where it is not."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def rows_per_sample(x: Tensor) -> int:
    """Rows of a sample of x (B, ..., C): what one element of row_scale covers."""
    return max(1, x.numel() // max(1, x.shape[0] * x.shape[-1]))


def empty(parameter: Tensor) -> Tensor:
    """An uninitialised gradient of a parameter, contiguous whatever the parameter's strides."""
    return parameter.new_empty(parameter.shape)
