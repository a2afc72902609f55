"""Where a run computes, and the words with which its summary says so."""

from __future__ import annotations

import platform
import resource
import subprocess
from pathlib import Path

import torch
import torchmetrics
import torchvision

import deit_fast
from deit_fast.errors import ConfigError
from deit_fast.training.config import RunConfig


def resolve_device(name: str) -> torch.device:
    """The device that `--device` means; "auto" is the first GPU, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here. "
                          "Use --device cpu or auto.")
    return device


def set_determinism(deterministic: bool) -> None:
    """Only deterministic kernels, or the fastest that cuDNN finds."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def autocast(device: torch.device, run: RunConfig) -> torch.autocast:
    """The context of --amp, which changes nothing when that is off."""
    return torch.autocast(device.type, getattr(torch, run.amp_dtype), enabled=run.amp)


def describe_device(device: torch.device) -> str:
    """The name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory in tensors, or of the host's in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def commit() -> str | None:
    """The git commit of this code, with "+changes" when files differ from it; None when it is no checkout."""
    git = ["git", "-C", str(Path(deit_fast.__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True,
                                 text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    return {"deit_fast": deit_fast.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "torchmetrics": torchmetrics.__version__}
