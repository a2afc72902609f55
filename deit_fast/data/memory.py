"""How much room there is for images."""

from __future__ import annotations

import os

import torch


def physical_memory() -> int:
    """Bytes of this machine's memory: all of it, since what counts as free leaves out the file cache."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room(device: torch.device | str) -> int:
    """Bytes that resident images may take: a quarter of what is free on a GPU, half of this machine's memory for a CPU.

    On a GPU the loader that trains a teacher holds them once more, and the models need some; decoding holds them twice.
    """
    device = torch.device(device)
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else physical_memory() // 2
