"""Counting the moments at which a program waits for the device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountSyncs(TorchDispatchMode):
    """Counts the reads of a value on the host: `.item()`, `bool()`, `int()`, `float()` of a tensor, `nonzero`."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
                        torch.ops.aten.is_nonzero.default):
            self.reads += 1
        return function(*args, **(kwargs or {}))
