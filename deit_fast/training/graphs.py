"""A whole training step as one CUDA graph: plan, augmentation, forward, loss, backward and optimizer, replayed.

A step of a small model is hundreds of kernels of a few microseconds, and launching them from Python takes longer than
running them (Nguyen et al. 2021, "Accelerating PyTorch with CUDA Graphs"). A graph is recorded once and replayed with
one launch. What is recorded are addresses and Python's numbers, so
- everything that differs between two steps lies in one buffer, the row: the slice of the epoch's plan, the stored
  logits of the teacher, the number of the batch (it seeds dropout) and the learning rate. A step is a copy of its row
  out of the epoch's table, and a replay: two launches.
- the first updates run eagerly, on a side stream: they create the optimizer's state, compile kernels, let cuDNN choose.
  They are real steps, and recording executes nothing, so no batch is trained on twice.
- PyTorch's own generator needs no care: a graph registers it, and a replay draws where an eager step would have.
- with gradient accumulation there are two graphs, with and without the update. They share their memory, since neither
  leaves anything there that the other must not overwrite; gradients stay outside.
- what is known to keep a step from being recorded is asked for beforehand (`why_not`). Where a recording fails all the
  same, that step and all later ones are launched one by one, as in warming up, and a line on stderr says why. Nothing
  is lost or done twice: the kernels of a failed recording never ran, the step's state consists of tensors that only
  they write, and PyTorch's generator counts a recording's draws apart. What the step's Python binds anew are gradients
  alone, and those are put back, for the new ones lie in the graph's memory and were never computed. (An error in a
  replay stays an error: nobody knows how much of the step was done.)

The losses are those of eager steps, bit for bit, and so are checkpoints. NOT YET RUN ON A GPU: the tests replay a tape
of PyTorch's operators on a CPU (tests/tape.py), which shows a value frozen by mistake but knows nothing of CUDA.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from deit_fast.data.plan import Plan
from deit_fast.errors import TrainingError
from deit_fast.training.config import RunConfig
from deit_fast.training.job import Job
from deit_fast.training.optim import Schedule, capturable
from deit_fast.training.steps import Learner

WARMUP = 3  # updates before the recording: PyTorch's advice, of which cuDNN's choice needs the most
ALIGNMENT = 16  # bytes: of the columns in a row, for vector loads

# The first torch in which a failed capture leaves the allocator and the generators as they were (pytorch pull requests
# 176752, 180395 and 190348). Before, memory counts as being captured for ever, and drawing random numbers raises.
UNWINDS = torch.__version__ >= (2, 14)


def why_not(job: Job, run: RunConfig, device: torch.device) -> str | None:
    """Why the steps of a job cannot be replayed from a CUDA graph, or None."""
    if not run.cuda_graphs:
        return "--no-cuda-graphs"
    if device.type != "cuda":
        return f"the device is {device}"
    if run.amp and run.amp_dtype == "float16":
        return "the loss scaler of --amp-dtype float16 looks at the gradients in every step"
    if run.torchcompile:
        return "--torchcompile may compile anew in any step"
    if getattr(job.model, "grad_checkpointing", False):
        return "--grad-checkpointing saves and restores the random state within a step"
    if not job.train.resident:
        return "the images come from the host"
    if os.environ.get("DEIT_FAST_CHECK") == "1":
        return "DEIT_FAST_CHECK=1 reads the plan's values in every step"
    return None


@dataclass(frozen=True)
class Column:
    """Where a tensor lies in a row of bytes."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Layout:
    """How the tensors of a step share a row: each at a multiple of ALIGNMENT bytes.

    columns: name -> (S, ...), a slice for each of S steps.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns: dict[str, Column] = {}
        self.width = 0
        for name, tensor in columns.items():
            end = self.width + tensor[0].numel() * tensor.element_size()
            self.columns[name] = Column(self.width, end, tensor.dtype, tuple(tensor.shape[1:]))
            self.width = -(-end // ALIGNMENT) * ALIGNMENT

    def table(self, columns: dict[str, Tensor]) -> Tensor:
        """(S, width) uint8: a row for each step."""
        device, steps = next((tensor.device, len(tensor)) for tensor in columns.values())
        table = torch.zeros((steps, self.width), dtype=torch.uint8, device=device)
        for name, tensor in columns.items():
            place = self.columns[name]
            assert (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape[1:])), name
            table[:, place.start : place.end] = tensor.reshape(steps, -1).view(torch.uint8)
        return table

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The tensors in a row (width,) uint8, sharing its memory."""
        return {name: row[place.start : place.end].view(place.dtype).view(place.shape)
                for name, place in self.columns.items()}


class CannotCapture(Exception):
    """A call cannot be recorded, and the text says why. Nothing of it was done, and it can run in another way."""


class Recorder(Protocol):
    """What warms up and records a call; `CudaGraphs`, or a tape in the tests."""

    def warm_up(self, call: Callable[[], None]) -> None:
        """Runs the call."""

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """A function that does what the call does, or CannotCapture; the call itself has no effect on tensors here."""


class CudaGraphs:
    """Recorder on a GPU: all graphs recorded by it share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], None]) -> None:
        """Runs the call on the side stream, which the recording uses too, so that autograd sees one stream."""
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                call()
            here.wait_stream(self.stream)

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """The replay of the call's graph; CannotCapture when something in it cannot be captured.

        Out of memory is among the reasons, for a graph has a pool of its own beside what eager steps need.
        TrainingError instead before torch 2.14 (see UNWINDS), and CUDA's own error where the GPU takes no more work.
        """
        graph, reason = torch.cuda.CUDAGraph(), None
        try:
            # The outer stream: torch.cuda.graph leaves its own as the current one where ending the capture raises.
            with (torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream()),
                  torch.cuda.graph(graph, pool=self.pool, stream=self.stream)):
                try:
                    call()
                except RuntimeError as error:  # kept as a text: its frames hold the step's tensors
                    reason = _first_line(error)
        except RuntimeError as error:
            if error.__context__ is not None:  # no error of CUDA: an interrupt, a failed assertion
                raise error.__context__
            reason = reason or _first_line(error)  # an invalid capture also raises at its end, and does not say why
        if reason is None:
            return graph.replay
        if not UNWINDS:
            raise TrainingError(f"the training step cannot be captured in a CUDA graph: {reason}. Train with "
                                "--no-cuda-graphs, or with torch 2.14 or newer, where the run goes on without.")
        with torch.cuda.device(self.device):
            graph.reset()
            torch.cuda.synchronize()  # raises where the capture has not ended, or the GPU is lost
        raise CannotCapture(reason)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class GraphedSteps:
    """The steps of an epoch, replayed from graphs once the first updates are done, or launched where recording fails.

    The loader draws on the device and leaves out a last partial batch, so all steps have the same shapes.
    """

    def __init__(self, learner: Learner, schedule: Schedule, recorder: Recorder) -> None:
        loader = learner.job.train
        assert loader.images_per_epoch == len(loader) * loader.batch_size, "the last batch is partial"
        self.learner, self.schedule, self.recorder = learner, schedule, recorder
        self.steps = schedule.steps_per_epoch * learner.accumulate
        self.updates = 0  # done in warming up
        self.replays: dict[bool, Callable[[], None]] = {}  # with and without an update
        self.refused: str | None = None  # why a recording failed: from then on no step is replayed
        self.plan: Plan | None = None  # the epoch's; of the tensors without rows and of its modes, a step's too
        self.layout: Layout | None = None
        self.row: Tensor | None = None  # (width,) uint8: what differs between two steps

    def epoch(self, epoch: int, start: int) -> Iterator[None]:
        """Trains on one batch of the epoch per iteration, from batch `start` on."""
        columns = self._columns(epoch)
        if self.layout is None:
            self.layout = Layout(columns)
            self.row = torch.zeros(self.layout.width, dtype=torch.uint8, device=self.learner.device)
        table = self.layout.table(columns)  # (S, width)
        for step in range(start, self.steps):
            self.row.copy_(table[step])
            self._run((step + 1) % self.learner.accumulate == 0)
            yield

    def _columns(self, epoch: int) -> dict[str, Tensor]:
        """Everything that the steps of an epoch differ in: name -> (S, ...)."""
        job, steps, device = self.learner.job, self.steps, self.learner.device
        with job.recipe_of(epoch):
            self.plan = job.train.plan(epoch)
            per_image = {name: tensor for name, tensor in self.plan.tensors().items() if len(tensor)}
            if job.teacher_logits is not None:
                per_image["teacher_logits"] = job.teacher_logits(epoch)
        B = job.train.batch_size
        columns = {name: tensor[: steps * B].unflatten(0, (steps, B)) for name, tensor in per_image.items()}
        numbers = range(epoch * steps, (epoch + 1) * steps)
        rates = [self.schedule.lr(number // self.learner.accumulate) for number in numbers]
        columns["number"] = torch.tensor(numbers, device=device)
        columns["lr"] = torch.tensor(rates, dtype=torch.float64, device=device)
        return columns

    def _run(self, updates: bool) -> None:
        """The step of the batch whose row is in place, with an update of the weights or without."""
        call = partial(self._step, updates)
        if self.updates >= WARMUP and self.refused is None and updates not in self.replays:
            self._record(updates, call)
        if updates in self.replays:
            self.replays[updates]()
        else:
            self.recorder.warm_up(call)
            self.updates += updates

    def _record(self, updates: bool, call: Callable[[], None]) -> None:
        """Records a step, or notes and prints why that cannot be done and gives up the other graph too."""
        optimizer = self.learner.optimizer
        gradients = [(weight, weight.grad) for group in optimizer.param_groups for weight in group["params"]]
        try:
            with capturable(optimizer):
                self.replays[updates] = self.recorder.record(call)
            return
        except CannotCapture as error:
            self.refused = str(error)
        self.replays.clear()  # gives back the pool of memory
        for weight, gradient in gradients:
            weight.grad = gradient
        print(f"deit_fast: {self.learner.job.title}steps: launched one by one from here on, without a CUDA graph: "
              f"{self.refused}", file=sys.stderr)

    def _step(self, updates: bool) -> None:
        """The step as a function of the row and the learner's state: what is recorded."""
        job, inputs = self.learner.job, self.layout.views(self.row)
        number, lr = inputs.pop("number"), inputs.pop("lr")
        logits = () if job.teacher_logits is None else (inputs.pop("teacher_logits"),)
        images, targets = job.train.batch(replace(self.plan, **inputs))
        self.learner.learn(number, images, targets, *logits)
        if updates:
            self.learner.update(lr)
