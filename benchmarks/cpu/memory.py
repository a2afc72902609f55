"""Peak memory of a training step: how far a fresh process grows over what it holds before the first one.

The process's resident memory counts everything, allocator and workspace included. `python -m cpu.memory NAME DTYPE` (in
benchmarks/) is such a process; Linux resets the peak when 5 is written to clear_refs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from deit_fast import create_model

from .models import DROP, MODEL, Seeded, training

STEPS = 3


def compare_memory(batch: int, threads: int) -> None:
    """Prints the growth for ours and for `reference`, in fp32 and under bf16 autocast."""
    print(f"\npeak resident memory of {STEPS} training steps over the process before them, batch {batch}")
    for dtype in ("fp32", "bf16"):
        found = {}
        for name in ("ours", "reference"):
            command = [sys.executable, "-m", "cpu.memory", name, dtype, str(batch), str(threads)]
            run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
            found[name] = int(run.stdout.split()[-1]) / 1024
        print(f"  {dtype}  ours {found['ours']:7.1f} MiB   reference {found['reference']:7.1f} MiB   "
              f"{found['ours'] / found['reference']:.2f} of it", flush=True)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0])


def main(name: str, dtype: str, batch: str, threads: str) -> None:
    """Prints by how many KiB this process grows."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model = create_model(MODEL, drop_rate=DROP)
    step = training(int(batch))(Seeded(model) if name == "ours" else model, name == "ours", dtype == "bf16")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        step()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
