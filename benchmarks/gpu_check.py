"""Everything that needs a GPU, in one command that a borrowed machine can run: parity, CUDA graphs, op and step speeds.

    python benchmarks/gpu_check.py [--only SECTION ...] [--out gpu_check.json]

Figures are merged into the JSON file after every row, so a run that is cut off keeps what it measured, and printed as a
table at the end. Each call is timed by replaying a CUDA graph of it (no launch costs, the fair view of kernels) against
the same for plain PyTorch and for `torch.compile` with max-autotune. A section takes no new row once it is 7 minutes
old. `--rehearse` walks through everything on a CPU, with small batches and no graphs; run it under TRITON_INTERPRET=1.

On a GPU that is borrowed for half an hour, `scripts/gpu.sh` builds, then runs the sections and the study in the order
of what they are worth.

A section is a function Machine -> rows (name, figures), in a module of `benchmarks/gpu/`, and a line of SECTIONS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for determinism, before cuBLAS starts; Hopper's default size

import torch  # noqa: E402

from deit_fast.training.files import atomic_write  # noqa: E402
from gpu.augment import augmentation  # noqa: E402
from gpu.correct import graphs, parity  # noqa: E402
from gpu.machine import Machine  # noqa: E402
from gpu.op_speeds import op_speeds, rates  # noqa: E402
from gpu.steps import preset_speeds  # noqa: E402
from gpu.training import losses, train_step  # noqa: E402

BUDGET = 7 * 60.0  # seconds after which a section takes no new row
SECTIONS = {"parity": parity, "graphs": graphs, "losses": losses, "rates": rates, "ops": op_speeds, "step": train_step,
            "presets": preset_speeds, "augment": augmentation}


def environment(machine: Machine) -> dict[str, str]:
    """Device, versions and commit."""
    clocks = "" if machine.rehearse else _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit",
                                                 "--format=csv,noheader")
    return {"device": "CPU rehearsal" if machine.rehearse else torch.cuda.get_device_name(), "torch": torch.__version__,
            "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version()), "clocks, power": clocks,
            "date": time.strftime("%Y-%m-%d"), "commit": _output("git", "rev-parse", "HEAD")}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def print_tables(results: dict) -> None:
    """Every section as a Markdown table, a line per figure."""
    print(f"{', '.join(f'{key} {value}' for key, value in results['environment'].items() if value)}")
    for section in filter(results.__contains__, SECTIONS):
        print(f"\n### {section}\n\n| | figures |\n|---|---|")
        for row, figures in results[section].items():
            cells = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                              for key, value in figures.items())
            print(f"| {row} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--rehearse", action="store_true", help="walk through on a CPU; its figures mean nothing")
    chosen = parser.parse_args()
    if not chosen.rehearse and not torch.cuda.is_available():
        sys.exit("gpu_check: there is no CUDA GPU here; --rehearse walks through the sections on a CPU.")
    machine = Machine(chosen.rehearse)
    results = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    results["environment"] = environment(machine)
    for section in chosen.only:
        results[section], start = {}, time.monotonic()
        for row, figures in SECTIONS[section](machine):
            results[section][row] = figures
            atomic_write(chosen.out, lambda file: file.write(json.dumps(results, indent=1).encode()))
            print(f"{section}: {row}: {figures}", flush=True)
            if time.monotonic() - start > BUDGET:
                results[section]["cut off"] = {"seconds": time.monotonic() - start}
                break
    print_tables(results)


if __name__ == "__main__":
    main()
