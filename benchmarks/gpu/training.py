"""The whole training step of `train` at the report's size: its losses with and without graphs, its speed, its memory.

Everything runs through the Trainer's own parts (loader, objective, steps) on made-up images of CIFAR-10's shape and
number, with stored teacher logits, as `python -m deit_fast.train --fused --amp` does for the report's DeiT.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache, lru_cache, partial
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
from deit_fast.training.graphs import CannotCapture, GraphedSteps
from deit_fast.training.job import Job
from deit_fast.training.progress import Log

from .machine import Machine
from .results import Contender, Figures
from .steps import BASELINES, Convert, counts_of, plain_step, speed

PRESET, K, LEARNED_STEPS = "deit_nano_distilled_patch4_32", 10, 200
RECIPE = Recipe(crop_pad=4, hflip=0.5)


def backends(machine: Machine, native: bool, whole_blocks: bool = True) -> AbstractContextManager:
    """The Triton kernels by name, and for an op that has none here what else the device has; or plain PyTorch.

    whole_blocks: a block is the kernels of `encoder_block`, else those of its four ops.
    """
    if not native:
        return deit_fast.use_backend("reference")
    candidates = ("triton", "cpu" if machine.rehearse else "cuda")
    chosen = {name: next((backend for backend in candidates if op.why_not_here(backend) is None), "reference")
              for name, op in OPS.items()}
    return deit_fast.use_backend(**(chosen if whole_blocks else {**chosen, "encoder_block": "reference"}))


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


def check_replayed(trainer: Trainer) -> None:
    """CannotCapture if steps that were to be replayed were launched one by one: theirs are not a graph's figures."""
    if isinstance(trainer.steps, GraphedSteps) and trainer.steps.refused is not None:
        raise CannotCapture(trainer.steps.refused)


def loss_curve(trainer: Trainer, steps: int) -> list[float]:
    """The loss of each of the first steps."""
    sums = [trainer.learner.loss_sum.item() for _ in islice(steps_of(trainer), steps)]
    check_replayed(trainer)
    return [after - before for before, after in zip([0.0, *sums], sums)]


def losses(machine: Machine) -> Iterator[Contender]:
    """200 steps: graphs and eager steps must agree bit for bit, Triton and reference at first closely, at the end too.

    With deterministic kernels: otherwise two eager runs differ as well.
    """
    steps, batch_size = (6, 2) if machine.rehearse else (LEARNED_STEPS, 64)

    @cache
    def curve(who: str, amp: bool, graphed: bool) -> list[float]:
        """The losses of "triton", "reference", or "masked": reference with Triton's dropout masks, slow Philox."""
        native, seeded = who == "triton", who != "reference"
        augment = {"augment": "cpu" if machine.rehearse else "reference"} if who == "masked" else {}
        set_determinism(True)
        try:
            with backends(machine, native), deit_fast.use_backend(**augment):
                return loss_curve(make_trainer(machine, batch_size, graphed=graphed, seeded=seeded, amp=amp), steps)
        finally:
            set_determinism(False)

    def replayed(who: str, amp: bool) -> Figures:
        eager, graphed = (curve(who, amp, which) for which in (False, True))
        different = [step for step, pair in enumerate(zip(eager, graphed)) if pair[0] != pair[1]]
        return {"equal": not different, "first difference": different[0] if different else None,
                "largest difference": max(abs(a - b) for a, b in zip(eager, graphed)), "last loss": eager[-1]}

    def apart(amp: bool) -> Figures:
        ours, plain, tail = curve("triton", amp, True), curve("masked", amp, False), max(1, steps // 10)
        return {"largest relative difference of 10 steps": max(abs(a - b) / b for a, b in zip(ours[:10], plain)),
                "of all steps": max(abs(a - b) / b for a, b in zip(ours, plain)),
                "mean of the last tenth": sum(ours[-tail:]) / tail, "reference's": sum(plain[-tail:]) / tail}

    for amp in (False,) if machine.rehearse else (False, True):
        dtype = "bf16" if amp else "fp32"
        for who in ("reference", "triton"):
            yield Contender(f"{dtype}: graphs against eager", who, partial(replayed, who, amp))
        yield Contender(f"{dtype}: against reference, same masks", "triton", partial(apart, amp))


def train_step(machine: Machine) -> Iterator[Contender]:
    """Milliseconds, images/s and peak memory of a step, per contender: "ours" in whole blocks, "four ops" op by op.

    Ours draws the plan, augments, reads stored logits and sets the learning rate; the baselines are handed one
    finished batch for ever, which does them a favour. The compiled ones are replayed from one CUDA graph, as ours is.
    """
    for B in (2,) if machine.rehearse else machine.batches:
        row = f"batch {B}"
        for who, native, graphed, whole_blocks in (
                ("ours, graphs", True, True, True), ("four ops, graphs", True, True, False),
                ("ours, eager", True, False, True), ("reference, graphs", False, True, True)):
            yield Contender(row, who, partial(trainer_figures, machine, B, native, graphed, whole_blocks))
        for who, convert in BASELINES.items():
            for compiled, how in ((False, "eager"), (True, "max-autotune, graph")):
                yield Contender(row, f"{who}, {how}", rank=int(compiled),
                                measure=partial(plain_figures, machine, B, convert, compiled))


def trainer_figures(machine: Machine, batch_size: int, native: bool, graphed: bool,
                    whole_blocks: bool = True) -> Figures:
    """The speed and memory of a Trainer's steps; when it returns, their memory is free."""
    with backends(machine, native, whole_blocks):
        trainer = make_trainer(machine, batch_size, graphed=graphed, seeded=native, amp=not machine.rehearse)
        each = machine.in_a_row(steps_of(trainer))
        check_replayed(trainer)
    model = trainer.job.model
    return (speed(machine, batch_size, each, counts_of(model, batch_size, training=True, parameter=4))
            | machine.peak(model, trainer.learner.optimizer))


def plain_figures(machine: Machine, batch_size: int, convert: Convert | None, compiled: bool) -> Figures:
    """The speed and memory of a plain loop's steps, of our model in plain PyTorch or of what `convert` makes of it."""
    with deit_fast.use_backend("reference"):
        step = plain_step(machine, PRESET, batch_size, convert, compiled)
        each = machine.milliseconds(step.call) if compiled else machine.in_a_row(step.call() for _ in count())
    return speed(machine, batch_size, each, step.counts) | machine.peak(step.model, step.optimizer)
