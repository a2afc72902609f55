"""The CUDA backend: the extension module `_cuda`, which setup.py builds when nvcc is found."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deit_fast.backend import KernelError

# Without a GPU nothing of it is loaded, so that no import can fail for want of a driver.
_built = importlib.util.find_spec("deit_fast._cuda") is not None
module = importlib.import_module("deit_fast._cuda") if _built and torch.cuda.is_available() else None

FAILED: dict[torch.device, str] = {}  # why the module cannot serve a GPU, once a launch has shown it
NOT_LOADED = ("kernel image", "PTX")  # what CUDA's words for that have in them, and no others


def why_not() -> str | None:
    """Why no CUDA kernel can run on this machine, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    if not _built:
        return "the CUDA extension is not built: install the CUDA toolkit (nvcc) and run `pip install -e .` again"
    return None


@contextmanager
def loading(op: str, device: torch.device) -> Iterator[None]:
    """Around a launch: KernelError, remembered in FAILED, on a GPU that the module was not built for.

    CUDA says so when it loads a kernel for its first launch; all other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in NOT_LOADED):
            raise
        major, minor = torch.cuda.get_device_capability(device)
        FAILED[device] = (f"the CUDA extension was not built for {torch.cuda.get_device_name(device)} ({error}): run "
                          f"`DEIT_FAST_CUDA_ARCHS={major}{minor} pip install -e .`")
        raise KernelError(f"{op}: {FAILED[device]}.") from error
