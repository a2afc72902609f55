"""Everything that needs a GPU, in one command that a borrowed machine can run: parity, CUDA graphs, op and step speeds.

    python benchmarks/gpu_check.py [--only SECTION ...] [--out gpu_check.json] [--minutes 25]

Figures land in the JSON file one by one, so a run that is cut off keeps what it measured, and the next one on the same
machine and sources goes on where it stopped (`DEIT_FAST_COMMIT` names the commit where there is no .git). All of them
are printed as tables at the end, beside them shares of what the chip reaches and ratios to the fastest baseline. Calls
are timed by replaying CUDA graphs (no launch costs, the fair view of kernels), ours like plain PyTorch, timm's model
and what `torch.compile` with max-autotune makes of both. A section starts nothing new once it is 6 minutes old, and
none does after --minutes. `--rehearse` walks through everything on a CPU, with small batches and no graphs; run it
under TRITON_INTERPRET=1. Exit codes: 1 after an error, 3 where it took the GPU from this process and not all have had
their turn: the same command goes on behind it.

On a GPU that is borrowed for half an hour, `scripts/gpu.sh` builds, then runs the sections and the study in the order
of what they are worth.

A section is a function Machine -> contenders (results.py), in a module of `benchmarks/gpu/`, and a line of SECTIONS.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for determinism, before cuBLAS starts: 32 MiB

import torch  # noqa: E402

from deit_fast.training.device import commit  # noqa: E402
from gpu.augment import augmentation  # noqa: E402
from gpu.correct import graphs, parity  # noqa: E402
from gpu.inference import inference  # noqa: E402
from gpu.machine import Machine, nvidia_smi  # noqa: E402
from gpu.op_speeds import op_speeds, rates  # noqa: E402
from gpu.results import Lost, Results, run, table  # noqa: E402
from gpu.steps import preset_speeds  # noqa: E402
from gpu.training import losses, train_step  # noqa: E402

AGAIN = 3  # exit code: the process lost the GPU, and a new one has more to do
SECONDS = 6 * 60.0  # after which a section starts nothing new
SECTIONS = {"parity": parity, "step": train_step, "inference": inference, "ops": op_speeds, "graphs": graphs,
            "losses": losses, "presets": preset_speeds, "rates": rates, "augment": augmentation}


def environment(machine: Machine) -> dict[str, str]:
    """Device, versions, commit, and a digest of the sources that are measured."""
    versions = {"torch": torch.__version__, "triton": metadata.version("triton"), "python": platform.python_version(),
                "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    if machine.rehearse:
        device = {"device": "CPU rehearsal"}
    else:
        device = {"device": torch.cuda.get_device_name(), "power limit": nvidia_smi("power.limit"),
                  "driver": nvidia_smi("driver_version")}
    return {**device, **versions, "commit": os.environ.get("DEIT_FAST_COMMIT") or commit() or "unknown",
            "sources": sources(), "date": time.strftime("%Y-%m-%d")}


def sources() -> str:
    """A digest of the package's Python, C++ and CUDA files: what figures are of, where no commit says so."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("csrc", "deit_fast") for path in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".yaml", ".h", ".cpp", ".cuh", ".cu"):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--minutes", type=float, default=25.0, help="after which nothing new is started")
    parser.add_argument("--rehearse", action="store_true", help="walk through on a CPU; its figures mean nothing")
    chosen = parser.parse_args()
    if not chosen.rehearse and not torch.cuda.is_available():
        sys.exit("gpu_check: there is no CUDA GPU here; --rehearse walks through the sections on a CPU.")
    machine = Machine(chosen.rehearse)
    end = time.monotonic() + 60 * chosen.minutes
    results = Results(chosen.out, environment(machine))
    more = False
    for section in chosen.only:
        machine.deadline = min(end, time.monotonic() + SECONDS)
        try:
            run(section, SECTIONS[section](machine), results, machine)
        except Lost as lost:
            print(f"gpu_check: {section}: the GPU takes no more work from this process: {lost}", file=sys.stderr)
            more = bool(results.sections[section]["left out"]) or section != chosen.only[-1]
            break
    print("\n".join(table(results.sections, SECTIONS)), flush=True)
    if more:
        sys.exit(AGAIN)
    if errors := results.errors():
        sys.exit(f"gpu_check: {errors} contenders failed.")


if __name__ == "__main__":
    main()
