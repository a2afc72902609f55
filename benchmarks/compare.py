"""How fast the native ops are, in ratios: `python benchmarks/compare.py --device cpu`.

Absolute times on a shared machine drift by half within minutes, so every figure is a ratio of candidates that take turns in
one process: each round runs all of them once, and the median over rounds of (baseline's time / ours) is printed. Beside
it stand rates, in percent of the peak that a loop on registers alone reaches in the same run (`torch.mm` for scale).

The baselines are PyTorch's own: `reference` and timm's model (when it is installed), eager, under `torch.compile`, and
under bf16 autocast. They draw PyTorch's dropout; ours draws the seeded masks that every backend shares. Backward is counted as
two products for each of forward's, whatever is computed again.

    --parts ops,train,infer,sweep   default: the first three; sweep is the cost of an image at batch 16 to 1024
    --no-compile                    leaves torch.compile out (it takes most of the four minutes)
    --thorough                      timm's model under torch.compile too
    --threads 1                     counts CPU time, which other processes hardly disturb
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deit_fast import create_model, ops, use_backend
from deit_fast.backend import record
from deit_fast.kernels import cpu
from deit_fast.training.config import OptimConfig
from deit_fast.training.optim import create_optimizer

MODEL, BATCH, TOKENS, C, HEADS, HIDDEN, DROP = "deit_nano_distilled_patch4_32", 64, 66, 64, 8, 256, 0.1
Candidates = dict[str, Callable[[], object]]
clock = time.perf_counter  # main picks the CPU time of the process where there is one thread: others hardly disturb it


def take_turns(candidates: Candidates, rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 2):
        for name, call in candidates.items():
            start = clock()
            call()
            if index >= 2:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], baseline: str, ours: str) -> float:
    """The median over rounds of baseline / ours: how many times faster ours is."""
    return statistics.median(b / o for b, o in zip(times[baseline], times[ours]))


def peaks(threads: int) -> dict[torch.dtype, float]:
    """FLOP/s from registers, per dtype; prints them beside torch.mm's. The best of seven: others share the machine."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        rate = max(cpu.module.multiply_rate(dtype == torch.bfloat16, threads, 2_000_000) for _ in range(7))
        a, b = torch.randn(2, 1024, 1024).to(dtype)
        seconds = min(take_turns({"mm": lambda: a @ b}, 10)["mm"])
        print(f"peak {str(dtype)[6:]:9s} {rate / 1e9:7.0f} GFLOP/s from registers, {2 * 1024**3 / seconds / 1e9:7.0f} torch.mm")
        found[dtype] = rate
    return found


# ---- Single ops


def op_calls(dtype: torch.dtype) -> dict[str, tuple[Callable[[str], Tensor], int]]:
    """For each op, (its call with a backend's name, FLOP of forward), at the nano preset's shape with training's dropout."""
    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype).requires_grad_()

    rows, seed = BATCH * TOKENS, torch.tensor(11)
    x, y, qkv = tensor(BATCH, TOKENS, C), tensor(BATCH, TOKENS, C), tensor(BATCH, TOKENS, 3 * C)
    norm = (tensor(C), tensor(C))
    w_qkv, w_proj = (tensor(3 * C, C, scale=0.1), tensor(3 * C)), (tensor(C, C, scale=0.1), tensor(C))
    mlp = (tensor(HIDDEN, C, scale=0.1), tensor(HIDDEN), tensor(C, HIDDEN, scale=0.1), tensor(C))

    def dropout(backend: str) -> tuple[float, Tensor | None]:
        return DROP, None if backend == "reference" else seed

    return {
        "layernorm_linear": (lambda be: ops.layernorm_linear(x, *norm, *w_qkv, backend=be), 2 * rows * C * 3 * C),
        "attention": (lambda be: ops.attention(qkv, HEADS, backend=be), 4 * rows * TOKENS * C),
        "linear_residual": (lambda be: ops.linear_residual(y, *w_proj, x, *dropout(be), backend=be), 2 * rows * C * C),
        "layernorm_mlp": (lambda be: ops.layernorm_mlp(x, *norm, *mlp, 1e-6, *dropout(be), backend=be), 4 * rows * C * HIDDEN),
    }


def split_times(calls: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(forward, backward) seconds of each candidate in each round."""
    outputs: dict[str, Tensor] = {}
    forward: Candidates = {name: lambda name=name, call=call: outputs.__setitem__(name, call()) for name, call in calls.items()}
    times: tuple[dict, dict] = ({name: [] for name in calls}, {name: [] for name in calls})
    for index in range(rounds + 2):
        for name, call in forward.items():
            start = clock()
            call()
            middle = clock()
            outputs[name].backward(torch.ones_like(outputs[name]))
            if index >= 2:
                times[0][name].append(middle - start)
                times[1][name].append(clock() - middle)
    return times


def compare_ops(peak: dict[torch.dtype, float], compiled: bool) -> None:
    print(f"\nops at ({BATCH}, {TOKENS}, {C}), dropout {DROP}: GFLOP/s (% of peak), times faster than reference eager / compiled")
    for dtype in (torch.float32, torch.bfloat16):
        for name, (call, flops) in op_calls(dtype).items():
            candidates = {"reference": lambda call=call: call("reference")}
            if ops_served(name):
                candidates["ours"] = lambda call=call: call("cpu")
            if compiled:
                candidates["compiled"] = torch.compile(lambda call=call: call("reference"), dynamic=False)
            both = split_times(candidates, 20)
            texts = []
            for label, times, work in (("forward", both[0], flops), ("backward", both[1], 2 * flops)):
                ours = "ours" if "ours" in candidates else "reference"
                rate = work / statistics.median(times[ours])
                ratios = " / ".join(f"{ratio(times, other, ours):.2f}" for other in candidates if other != ours)
                texts.append(f"{label} {rate / 1e9:6.0f} ({100 * rate / peak[dtype]:3.0f} %) x {ratios or '-'}")
            print(f"  {str(dtype)[6:]:9s}{name:17s}{'   '.join(texts)}{'' if 'ours' in candidates else '   (reference)'}", flush=True)
            torch._dynamo.reset()


def ops_served(name: str) -> bool:
    """Whether the op has a CPU kernel that runs here."""
    from deit_fast.backend import OPS

    return OPS[name].why_not_here("cpu") is None


# ---- The report's model


def timm_model() -> nn.Module | None:
    """timm's DeiT of the same size, or None where timm is not installed."""
    try:
        from timm.models.deit import VisionTransformerDistilled
    except ImportError:
        return None
    return VisionTransformerDistilled(img_size=32, patch_size=4, embed_dim=C, depth=7, num_heads=HEADS, num_classes=10,
                                      proj_drop_rate=DROP, pos_drop_rate=DROP)


class Seeded(nn.Module):
    """Our model with a dropout seed that advances with every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.calls += 1
        return self.model(images, torch.tensor(self.calls))


def candidates_for(make: Callable[[nn.Module, bool, bool], Callable[[], object]], compiled: bool, thorough: bool) -> Candidates:
    """Ours and every baseline, each in fp32 and under bf16 autocast: make(model, native, autocast) gives what is timed."""
    built: Candidates = {}
    models = {"reference": lambda: create_model(MODEL, drop_rate=DROP), "timm": timm_model}
    for autocast in (False, True):
        suffix = " bf16" if autocast else " fp32"
        built["ours" + suffix] = make(Seeded(create_model(MODEL, drop_rate=DROP)), True, autocast)
        for name, build in models.items():
            if (model := build()) is not None:
                built[name + suffix] = make(model, False, autocast)
            if model is not None and compiled and (thorough or name == "reference"):
                built[f"{name} compiled{suffix}"] = make(torch.compile(build(), dynamic=False), False, autocast)
    return built


def bound(call: Callable[[], object], native: bool, autocast: bool) -> Callable[[], object]:
    """`call` under its backend and dtype."""
    def timed() -> object:
        with use_backend(None if native else "reference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return call()
    return timed


def training(batch: int) -> Callable[[nn.Module, bool, bool], Callable[[], object]]:
    """Forward, distillation loss, backward, AdamW."""
    images, target, teacher = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)), torch.randn(batch, 10)

    def make(model: nn.Module, native: bool, autocast: bool) -> Callable[[], object]:
        model.train()
        getattr(model, "set_distilled_training", lambda on: None)(True)
        optimizer = create_optimizer(model, OptimConfig(opt="adamw"))
        forward = bound(lambda: ops.distillation_loss(*model(images), target, teacher, "soft", 0.5, 3.0), native, autocast)

        def step() -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step
    return make


def inference(batch: int) -> Callable[[nn.Module, bool, bool], Callable[[], object]]:
    """Logits of a batch."""
    images = torch.randn(batch, 3, 32, 32)

    def make(model: nn.Module, native: bool, autocast: bool) -> Callable[[], object]:
        model.eval()
        forward = bound(lambda: model(images), native, autocast)

        def infer() -> None:
            with torch.inference_mode():
                forward()
        return infer
    return make


def report(title: str, candidates: Candidates, rounds: int, images: int) -> None:
    """Prints what each candidate reaches, and how many times faster ours is than the fastest baseline."""
    times = take_turns(candidates, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{title}")
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"  {name:24s}{seconds * 1e3:9.2f} ms {images / seconds:9.0f} images/s")
    fastest = min((name for name in medians if not name.startswith("ours")), key=medians.get)
    for ours in ("ours fp32", "ours bf16"):
        print(f"  {ours}: {ratio(times, fastest, ours):.2f} times as fast as {fastest}", flush=True)


def sweep() -> None:
    """Prints the cost of an image over batch sizes, relative to batch 64's."""
    print("\nms for an image, training step / inference")
    for autocast in (False, True):
        calls: Candidates = {}
        for batch in (16, 64, 256, 1024):
            model = Seeded(create_model(MODEL, drop_rate=DROP))
            calls[f"train {batch}"] = training(batch)(model, True, autocast)
        for batch in (16, 64, 256, 1024):
            model = Seeded(create_model(MODEL, drop_rate=DROP))
            calls[f"infer {batch}"] = inference(batch)(model, True, autocast)
        medians = {name: statistics.median(values) / int(name.split()[1]) for name, values in take_turns(calls, 3).items()}
        cells = "   ".join(f"{b}: {medians[f'train {b}'] * 1e3:.3f} / {medians[f'infer {b}'] * 1e3:.3f}" for b in (16, 64, 256, 1024))
        print(f"  {'bf16' if autocast else 'fp32'}  {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--parts", default="ops,train,infer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--thorough", action="store_true")
    args = parser.parse_args()
    if cpu.why_not():
        raise SystemExit(f"compare.py: {cpu.why_not()}")
    torch.set_num_threads(args.threads)
    global clock
    clock = time.process_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    parts, compiled = args.parts.split(","), not args.no_compile
    print(f"torch {torch.__version__}, {args.threads} threads, CPU kernels for {cpu.isa}")
    if "ops" in parts:
        compare_ops(peaks(args.threads), compiled)
    if "train" in parts:
        candidates = candidates_for(training(BATCH), compiled, args.thorough)
        with record() as served:
            candidates["ours bf16"]()
        report(f"training step of {MODEL}, batch {BATCH}", candidates, args.rounds, BATCH)
        print(f"  served by {served}")
    if "infer" in parts:
        for batch in (BATCH, 1):
            candidates = candidates_for(inference(batch), compiled, args.thorough)
            report(f"inference of {MODEL}, batch {batch}", candidates, args.rounds * (1 if batch > 1 else 10), batch)
    if "sweep" in parts:
        sweep()


if __name__ == "__main__":
    main()
