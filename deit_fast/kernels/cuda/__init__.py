"""The CUDA backend: the extension module `_cuda`, which setup.py builds when nvcc is found."""

from __future__ import annotations

import importlib
import importlib.util

import torch

# Without a GPU nothing of it is loaded, so that no import can fail for want of a driver.
_built = importlib.util.find_spec("deit_fast._cuda") is not None
module = importlib.import_module("deit_fast._cuda") if _built and torch.cuda.is_available() else None


def why_not() -> str | None:
    """Why no CUDA kernel can run on this machine, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    if not _built:
        return "the CUDA extension is not built: install the CUDA toolkit (nvcc) and run `pip install -e .` again"
    return None
