"""Everything that needs a GPU, in one command that a borrowed machine can run: parity, CUDA graphs, op and step speeds.

    python benchmarks/gpu_check.py [--only SECTION ...] [--out gpu_check.json]

Figures are merged into the JSON file after every row, so a run that is cut off keeps what it measured, and printed as a
table at the end. Each call is timed by replaying a CUDA graph of it (no launch costs, the fair view of kernels) against
the same for plain PyTorch and for `torch.compile` with max-autotune. A section takes no new row once it is 7 minutes
old. `--rehearse` walks through everything on a CPU, with small batches and no graphs; run it under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import deit_fast  # noqa: E402
from cases import CASES, VARIANTS, Maker  # noqa: E402
from deit_fast import ops, reference  # noqa: E402
from deit_fast.backend import OPS  # noqa: E402
from deit_fast.training.files import atomic_write  # noqa: E402
from gpu.augment import augmentation  # noqa: E402

BUDGET = 7 * 60.0  # seconds after which a section takes no new row
SHAPES = {"nano": (66, 64, 8), "tiny": (198, 192, 3), "small": (198, 384, 6)}  # N, C, H
BF16 = next(variant for variant in VARIANTS if variant.name == "bf16")
Row = tuple[str, dict]


class Machine:
    """The device and how to time a call on it."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse, self.device = rehearse, "cpu" if rehearse else "cuda"
        self.variant = next(v for v in VARIANTS if v.name == "fp32") if rehearse else BF16
        self.batches = (1,) if rehearse else (64, 1024)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Median time of a call; on a GPU of a replayed CUDA graph."""
        if self.rehearse:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        replay = captured(call)
        replay()
        times, first = [], time.perf_counter()
        while len(times) < 20 or time.perf_counter() - first < 0.2:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 10)
        return statistics.median(times)

    def compiled(self, function: Callable) -> Callable:
        """The function as Inductor's best kernels (graphs come from the timing, for every contender alike)."""
        return function if self.rehearse else torch.compile(function, mode="max-autotune-no-cudagraphs", fullgraph=True)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of the call, after three real calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rates(machine: Machine) -> Iterator[Row]:
    """What the chip reaches here: bf16 product and copy."""
    n = 256 if machine.rehearse else 8192
    a, b = (torch.randn(n, n, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    yield "bf16 matrix product", {"tflops": 2e-9 * n**3 / machine.milliseconds(lambda: a @ b)}
    x = torch.empty(2**20 if machine.rehearse else 2**30, dtype=torch.uint8, device=machine.device)
    y = torch.empty_like(x)
    yield "copy", {"gigabytes_per_second": 2e-6 * x.numel() / machine.milliseconds(lambda: y.copy_(x))}


def parity(machine: Machine) -> Iterator[Row]:
    """The parity table, a skip of Triton counted as a failure."""
    rows = "triton and attention and fp32 and 3x7" if machine.rehearse else "triton"
    command = [sys.executable, "-m", "pytest", "tests/test_parity.py", "-q", "-k", rows, "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=8 * 60,
                            env={**os.environ, "DEIT_FAST_REQUIRE": "triton",
                                 "PYTHONPATH": os.pathsep.join(sys.path[:2])})
    lines = result.stdout.strip().splitlines()
    yield "tests/test_parity.py", {"exit": result.returncode, "result": lines[-1] if lines else result.stderr[-300:],
                                   "failed": [line for line in lines if line.startswith("FAILED")][:40]}


def forward_backward(op: Callable, inputs: dict, grads: tuple[str, ...]) -> Callable[[], list[Tensor]]:
    """A call that gives the output and all gradients of an op on fixed inputs."""
    leaves = [inputs[name].requires_grad_() for name in grads]

    def call() -> list[Tensor]:
        out = op(**inputs)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return call


def graphs(machine: Machine) -> Iterator[Row]:
    """Every op, forward and backward, replayed from a CUDA graph on new inputs: the same bits as eager."""
    for case in CASES:
        if not case.compiled or not case.grads or "triton" not in OPS[case.op].offers:
            continue
        inputs = case.inputs(machine.variant, machine.device)
        other = case.make(Maker(1, machine.variant, machine.device))
        op = partial(getattr(ops, case.op), backend="triton")
        call = forward_backward(op, inputs, case.grads)
        results: list[Tensor] = []

        def keep() -> None:
            results[:] = call()

        replay = keep if machine.rehearse else captured(keep)
        with torch.no_grad():
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    value.copy_(other[name])
        replay()
        expected = forward_backward(op, other, case.grads)()
        yield case.id, {"equal": all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))}


def block_inputs(machine: Machine, B: int, N: int, C: int, H: int) -> dict[str, tuple[dict, tuple[str, ...]]]:
    """op -> (its inputs at one size, the arguments that need gradients)."""
    m = Maker(0, machine.variant, machine.device)
    layernorm = {"ln_weight": m.parameter(C, offset=1.0), "ln_bias": m.parameter(C)}
    x = partial(m.normal, B, N)
    return {
        "layernorm_linear": ({"x": x(C), **layernorm, "weight": m.parameter(3 * C, C), "bias": m.parameter(3 * C)},
                             ("x", "ln_weight", "ln_bias", "weight", "bias")),
        "attention": ({"qkv": x(3 * C), "num_heads": H}, ("qkv",)),
        "linear_residual": ({"x": x(C), "weight": m.parameter(C, C), "bias": m.parameter(C), "residual": x(C)},
                            ("x", "weight", "bias", "residual")),
        "layernorm_mlp": ({"x": x(C), **layernorm, "fc1_weight": m.parameter(4 * C, C), "fc1_bias": m.parameter(4 * C),
                           "fc2_weight": m.parameter(C, 4 * C), "fc2_bias": m.parameter(C)},
                          ("x", "ln_weight", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")),
    }


def op_speeds(machine: Machine) -> Iterator[Row]:
    """Milliseconds of each op, forward and with backward, against plain and compiled PyTorch and every SDPA."""
    for shape, (N, C, H) in list(SHAPES.items())[:1] if machine.rehearse else SHAPES.items():
        for B in machine.batches:
            for name, (inputs, grads) in block_inputs(machine, B, N, C, H).items():
                plain = getattr(reference, name)
                contenders = {"triton": partial(getattr(ops, name), backend="triton"), "eager": plain,
                              "compiled": machine.compiled(plain)}
                row = {}
                for who, op in contenders.items():
                    with torch.no_grad():
                        row[f"{who} forward"] = machine.milliseconds(partial(op, **inputs))
                    row[f"{who} both"] = machine.milliseconds(forward_backward(op, inputs, grads))
                    torch._dynamo.reset()
                if name == "attention" and not machine.rehearse:
                    row.update(sdpa_speeds(machine, inputs))
                yield f"{name} {shape} batch {B}", row


def sdpa_speeds(machine: Machine, inputs: dict) -> dict[str, float | str]:
    """Milliseconds of the plain attention under each SDPA backend that takes the shape."""
    row: dict[str, float | str] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.MATH):
        with sdpa_kernel(backend):
            try:
                with torch.no_grad():
                    row[f"{backend.name} forward"] = machine.milliseconds(partial(reference.attention, **inputs))
                both = forward_backward(reference.attention, inputs, ("qkv",))
                row[f"{backend.name} both"] = machine.milliseconds(both)
            except RuntimeError as error:
                row[f"{backend.name} refused"] = str(error).splitlines()[0]
    return row


def step_speeds(machine: Machine) -> Iterator[Row]:
    """Milliseconds and peak memory of a training step (forward, cross-entropy, backward, Adam) per contender."""
    presets = ("deit_nano_distilled_patch4_32", "deit_tiny_patch16_224", "deit_small_patch16_224",
               "deit_base_patch16_224")
    for preset in presets[:1] if machine.rehearse else presets:
        for B in machine.batches if "nano" in preset else (min(machine.batches[-1], 128),):
            row: dict[str, float] = {}
            for who in ("automatic", "eager", "compiled"):
                torch.manual_seed(0)
                model = deit_fast.create_model(preset, device=machine.device)
                side = model.patch_embed.img_size
                images = torch.randn(B, 3, side, side, device=machine.device)
                labels = torch.randint(model.num_classes, (B,), device=machine.device)
                # a seed lets native ops draw the preset's dropout; the baselines draw PyTorch's own
                seed = torch.zeros((), dtype=torch.int64, device=machine.device) if who == "automatic" else None
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=not machine.rehearse)
                run = machine.compiled(model) if who == "compiled" else model

                def step() -> None:
                    with torch.autocast(machine.device, torch.bfloat16, enabled=not machine.rehearse):
                        logits = run(images, seed)
                    logits = logits if isinstance(logits, tuple) else (logits,)
                    loss = sum(F.cross_entropy(each.float(), labels) for each in logits)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()

                if not machine.rehearse:
                    torch.cuda.reset_peak_memory_stats()
                with deit_fast.use_backend(None if who == "automatic" else "reference"):
                    row[f"{who} step"] = machine.milliseconds(step)
                if not machine.rehearse:
                    row[f"{who} peak MB"] = torch.cuda.max_memory_allocated() / 2**20
                torch._dynamo.reset()
            yield f"{preset} batch {B}", row


SECTIONS = {"rates": rates, "parity": parity, "graphs": graphs, "ops": op_speeds, "step": step_speeds,
            "augment": augmentation}


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
