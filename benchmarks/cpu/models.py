"""The report's model: training steps and inference of ours and of every baseline, and the cost of an image by batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deit_fast import create_model, freeze, ops, use_backend
from deit_fast.training.config import OptimConfig
from deit_fast.training.optim import create_optimizer

from .timing import Candidates, fastest, ratio, take_turns

MODEL, DROP = "deit_nano_distilled_patch4_32", 0.1
Make = Callable[[nn.Module, bool, bool], Callable[[], object]]  # (model, native, autocast) -> what is timed


def timm_model() -> nn.Module | None:
    """timm's DeiT of the same size, or None where timm is not installed."""
    try:
        from timm.models.deit import VisionTransformerDistilled
    except ImportError:
        return None
    return VisionTransformerDistilled(img_size=32, patch_size=4, embed_dim=64, depth=7, num_heads=8, num_classes=10,
                                      proj_drop_rate=DROP, pos_drop_rate=DROP)


class Seeded(nn.Module):
    """Our model with a dropout seed that advances with every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.calls += 1
        return self.model(images, torch.tensor(self.calls))


def candidates_for(make: Make, compiled: bool) -> Candidates:
    """What is timed for ours and for every baseline, each in fp32 and under bf16 autocast."""
    built: Candidates = {}
    models = {"reference": lambda: create_model(MODEL, drop_rate=DROP), "timm": timm_model}
    for autocast in (False, True):
        suffix = " bf16" if autocast else " fp32"
        built["ours" + suffix] = make(Seeded(create_model(MODEL, drop_rate=DROP)), True, autocast)
        for name, build in models.items():
            if (model := build()) is not None:
                built[name + suffix] = make(model, False, autocast)
            if model is not None and compiled:
                built[f"{name} compiled{suffix}"] = make(torch.compile(build(), dynamic=False), False, autocast)
    return built


def bound(call: Callable[[], object], native: bool, autocast: bool) -> Callable[[], object]:
    """`call` under its backend and dtype."""
    def timed() -> object:
        with use_backend(None if native else "reference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return call()
    return timed


def training(batch: int, size: int = 32, classes: int = 10) -> Make:
    """Forward, distillation loss (cross-entropy for a model with one head), backward, AdamW."""
    images = torch.randn(batch, 3, size, size)
    target, teacher = torch.randint(classes, (batch,)), torch.randn(batch, classes)

    def loss(logits: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(logits, Tensor):
            return ops.distillation_loss(logits, None, target)
        return ops.distillation_loss(*logits, target, teacher, "soft", 0.5, 3.0)

    def make(model: nn.Module, native: bool, autocast: bool) -> Callable[[], object]:
        model.train()
        getattr(model, "set_distilled_training", lambda on: None)(True)
        optimizer = create_optimizer(model, OptimConfig(opt="adamw"))
        forward = bound(lambda: loss(model(images)), native, autocast)

        def step() -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step
    return make


def inference(batch: int) -> Make:
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


def frozen(batch: int) -> Candidates:
    """Our model frozen: the logits of a batch."""
    images = torch.randn(batch, 3, 32, 32)
    model = create_model(MODEL).eval()
    calls = {name: freeze(model, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    return {f"ours frozen {name}": lambda call=call: call(images) for name, call in calls.items()}


def report(title: str, candidates: Candidates, rounds: int, images: int, calls: int = 1) -> None:
    """Prints what each candidate reaches, and how many times faster ours is than the fastest baseline."""
    times = take_turns(candidates, rounds, calls)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{title}")
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"  {name:24s}{seconds * 1e3:9.2f} ms {images / seconds:9.0f} images/s")
    best = fastest(times)
    for ours in (name for name in candidates if name.startswith("ours")):
        print(f"  {ours}: {ratio(times, best, ours):.2f} times as fast as {best}", flush=True)


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
        times = take_turns(calls, 3)
        cost = {name: 1e3 * statistics.median(values) / int(name.split()[1]) for name, values in times.items()}
        cells = "   ".join(f"{b}: {cost[f'train {b}']:.3f} / {cost[f'infer {b}']:.3f}" for b in (16, 64, 256, 1024))
        print(f"  {'bf16' if autocast else 'fp32'}  {cells}", flush=True)
