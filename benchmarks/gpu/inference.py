"""Inference of the report's DeiT: logits of a batch, all in bf16, by our kernels against plain and compiled models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count

import torch
from torch import Tensor

from .machine import Machine
from .results import Contender, Figures
from .steps import BASELINES, Convert, counts_of, made, speed
from .training import PRESET, backends


def inference(machine: Machine) -> Iterator[Contender]:
    """Milliseconds and peak memory of a batch, launched from Python ("eager") and replayed from a CUDA graph."""
    for B in machine.batches:
        row = f"batch {B}"
        for how, graphed in (("graph", True), ("eager", False)):
            for who, whole_blocks in (("ours", True), ("four ops", False)):
                yield Contender(row, f"{who}, {how}", partial(logits_figures, machine, B, None, False, graphed,
                                                              native=True, whole_blocks=whole_blocks))
            for who, convert in BASELINES.items():
                yield Contender(row, f"{who}, {how}", partial(logits_figures, machine, B, convert, False, graphed))
        for who, convert in BASELINES.items():
            yield Contender(row, f"{who}, max-autotune, graph", rank=1,
                            measure=partial(logits_figures, machine, B, convert, True, True))


def logits_figures(machine: Machine, batch_size: int, convert: Convert | None, compiled: bool, graphed: bool,
                   native: bool = False, whole_blocks: bool = True) -> Figures:
    """The speed of a model's logits in evaluation mode."""
    ours, model = made(machine, PRESET, convert)
    dtype = machine.variant.parameter
    model.eval().to(dtype)
    counts = counts_of(ours, batch_size, training=False, parameter=dtype.itemsize)
    side = ours.patch_embed.img_size
    images = torch.randn(batch_size, 3, side, side, device=machine.device, dtype=dtype)
    run = machine.compiled(model) if compiled else model

    def call() -> Tensor:
        return run(images)

    with backends(machine, native, whole_blocks), torch.no_grad():
        each = machine.milliseconds(call) if graphed else machine.in_a_row(call() for _ in count())
    return speed(machine, batch_size, each, counts) | machine.peak(model)
