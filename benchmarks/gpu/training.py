"""The whole training step of `train` at the report's size: its losses with and without graphs, its speed, its memory.

Everything runs through the Trainer's own parts (loader, objective, steps) on made-up images of CIFAR-10's shape and
number, with stored teacher logits, as `python -m deit_fast.train --fused --amp` does for the report's DeiT.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import chain, count, islice

import torch
from rich.console import Console
from torch import Tensor

import deit_fast
from deit_fast.backend import OPS
from deit_fast.data.augmentation import Recipe, epoch_order
from deit_fast.data.loader import TrainLoader
from deit_fast.data.split import Split
from deit_fast.training.build import dropout_seed
from deit_fast.training.config import DistillationConfig, OptimConfig, RunConfig
from deit_fast.training.device import set_determinism
from deit_fast.training.distillation import Objective
from deit_fast.training.engine import Trainer
from deit_fast.training.graphs import GraphedSteps
from deit_fast.training.job import Job
from deit_fast.training.progress import Log

from .machine import Machine, Row
from .steps import baseline_step, timm_model

PRESET, K, LEARNED_STEPS = "deit_nano_distilled_patch4_32", 10, 200
RECIPE = Recipe(crop_pad=4, hflip=0.5)


def backends(machine: Machine, native: bool) -> AbstractContextManager:
    """The Triton kernels by name, and for an op that has none here what else the device has; or plain PyTorch."""
    if not native:
        return deit_fast.use_backend("reference")
    candidates = ("triton", "cpu" if machine.rehearse else "cuda")
    return deit_fast.use_backend(**{name: next((backend for backend in candidates if op.why_not_here(backend) is None),
                                               "reference") for name, op in OPS.items()})


@lru_cache(maxsize=1)
def made_up(number: int, side: int) -> tuple[Split, Tensor]:
    """Images that show their class through noise, and a teacher's logits (number, K) fp16 of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(K, (number,), generator=generator)
    patterns = torch.randint(64, (K, 3, side, side), generator=generator, dtype=torch.uint8)
    images = torch.randint(192, (number, 3, side, side), generator=generator, dtype=torch.uint8)
    images += patterns[labels]
    return Split(images, labels), (4 * torch.eye(K)[labels] + torch.randn(number, K, generator=generator)).half()


def make_trainer(machine: Machine, batch_size: int, *, graphed: bool, seeded: bool, amp: bool) -> Trainer:
    """A Trainer of the report's DeiT; a rehearsal's is tiny. The same weights and data for the same arguments."""
    side, number, depth = (8, 8 * batch_size, 1) if machine.rehearse else (32, 45_000, None)
    split, of_teacher = made_up(number, side)
    of_teacher = of_teacher.to(machine.device)
    loader = TrainLoader(split, RECIPE, (0.5,) * 3, (0.25,) * 3, K, batch_size, device=machine.device)
    torch.manual_seed(0)
    model = deit_fast.create_model(PRESET, K, img_size=side, **({} if depth is None else {"depth": depth}))
    model.to(machine.device).train()
    device = torch.device(machine.device)

    def teacher_logits(epoch: int) -> Tensor:
        return of_teacher[epoch_order(number, 0, epoch)[: loader.images_per_epoch].to(device)]

    job = Job(PRESET, model, Objective(model.tokens, DistillationConfig(), None), loader, {}, K, None, {},
              seed=dropout_seed(0, device) if seeded else None, teacher_logits=teacher_logits)
    run = RunConfig(cuda_graphs=False, amp=amp)
    trainer = Trainer(job, OptimConfig(epochs=1000), run, device, Log(Console(file=io.StringIO())))
    if graphed:
        trainer.steps = GraphedSteps(trainer.learner, trainer.schedule, machine.recorder())
    torch.manual_seed(0)
    return trainer


def steps_of(trainer: Trainer) -> Iterator[None]:
    """Its steps, epoch after epoch."""
    return chain.from_iterable(trainer.steps.epoch(epoch, 0) for epoch in range(1000))


def loss_curve(trainer: Trainer, steps: int) -> list[float]:
    """The loss of each of the first steps."""
    sums = [trainer.learner.loss_sum.item() for _ in islice(steps_of(trainer), steps)]
    return [after - before for before, after in zip([0.0, *sums], sums)]


def losses(machine: Machine) -> Iterator[Row]:
    """200 steps: graphs and eager steps must agree bit for bit, Triton and reference at first closely, at the end too.

    With deterministic kernels: otherwise two eager runs differ as well.
    """
    set_determinism(True)
    try:
        yield from _agreements(machine)
    finally:
        set_determinism(False)


def _agreements(machine: Machine) -> Iterator[Row]:
    steps, batch_size = (6, 2) if machine.rehearse else (LEARNED_STEPS, 64)
    curves = {}
    for amp in (False,) if machine.rehearse else (False, True):
        for who, native in (("reference", False), ("triton", True)):
            for graphed in (False, True):
                with backends(machine, native):
                    trainer = make_trainer(machine, batch_size, graphed=graphed, seeded=native, amp=amp)
                    curves[who, amp, graphed] = loss_curve(trainer, steps)
            eager, replayed = curves[who, amp, False], curves[who, amp, True]
            different = [step for step, pair in enumerate(zip(eager, replayed)) if pair[0] != pair[1]]
            yield f"{who} {'bf16' if amp else 'fp32'}: graphs against eager", {
                "equal": not different, "first difference": different[0] if different else None,
                "largest difference": max(abs(a - b) for a, b in zip(eager, replayed)), "last loss": eager[-1]}
        with deit_fast.use_backend("reference", augment="cpu" if machine.rehearse else "reference"):
            trainer = make_trainer(machine, batch_size, graphed=False, seeded=True, amp=amp)
            plain = loss_curve(trainer, steps)  # slow: Philox in plain PyTorch, for the same masks
        ours, tail = curves["triton", amp, True], max(1, steps // 10)
        yield f"triton against reference, {'bf16' if amp else 'fp32'}, same masks", {
            "largest relative difference of 10 steps": max(abs(a - b) / b for a, b in zip(ours[:10], plain)),
            "of all steps": max(abs(a - b) / b for a, b in zip(ours, plain)),
            "mean of the last tenth": sum(ours[-tail:]) / tail, "reference's": sum(plain[-tail:]) / tail}


def train_step(machine: Machine) -> Iterator[Row]:
    """Milliseconds, images/s and peak memory of a step, per contender.

    "ours" draws the plan, augments, reads stored logits and sets the learning rate; the baselines are handed one
    finished batch for ever, which does them a favour. The compiled ones are replayed from one CUDA graph, as ours is.
    """
    for B in (2,) if machine.rehearse else machine.batches:
        for who, native, graphed in (("ours, graphs", True, True), ("ours, eager", True, False),
                                     ("reference, graphs", False, True)):
            yield f"batch {B}: {who}", trainer_figures(machine, B, native, graphed)
        for who, model, compiled in (("reference", None, False), ("reference", None, True), ("timm", timm_model, False),
                                     ("timm", timm_model, True)):
            name = f"batch {B}: {who}, {'max-autotune, graph' if compiled else 'eager'}"
            try:
                yield name, baseline_figures(machine, B, model, compiled)
            except ImportError as error:
                yield name, {"skipped": str(error)}
            torch._dynamo.reset()


def trainer_figures(machine: Machine, batch_size: int, native: bool, graphed: bool) -> dict[str, float]:
    """The speed of a Trainer's steps; when it returns, their memory is free."""
    machine.reset_peak()
    with backends(machine, native):
        trainer = make_trainer(machine, batch_size, graphed=graphed, seeded=native, amp=not machine.rehearse)
        return figures(machine, batch_size, in_a_row(machine, steps_of(trainer)))


def baseline_figures(machine: Machine, batch_size: int, convert: Callable | None, compiled: bool) -> dict[str, float]:
    """The speed of a plain loop's steps, of our model in plain PyTorch or of what `convert` makes of it."""
    machine.reset_peak()
    with deit_fast.use_backend("reference"):
        step = baseline_step(machine, PRESET, batch_size, convert, compiled)
        each = machine.milliseconds(step) if compiled else in_a_row(machine, (step() for _ in count()))
    return figures(machine, batch_size, each)


def figures(machine: Machine, batch_size: int, milliseconds: float) -> dict[str, float]:
    """What a line of a step's speed says."""
    return {"ms": milliseconds, "images/s": 1e3 * batch_size / milliseconds, **machine.peak()}


def in_a_row(machine: Machine, steps: Iterator[None]) -> float:
    """Milliseconds per step of many in a row, the host's part included, after some to warm up."""
    warm, timed = (5, 1) if machine.rehearse else (50, 500)
    finish: Callable[[], None] = (lambda: None) if machine.rehearse else torch.cuda.synchronize
    for _ in islice(steps, warm):
        pass
    finish()
    start = time.perf_counter()
    for _ in islice(steps, timed):
        pass
    finish()
    return 1e3 * (time.perf_counter() - start) / timed
