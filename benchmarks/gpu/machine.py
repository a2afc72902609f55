"""The device of a check, and how a call is timed on it: by replaying a CUDA graph of it."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn

from cases import VARIANTS, Variant
from deit_fast.training.graphs import WARMUP, CudaGraphs, Recorder

from .counts import Counts
from .results import Lost, one_line

MEBI = 2**20
TIMED = 0.2  # seconds, at the least, in which replays are timed
RELOADED = 128 * MEBI  # bytes that pass between two calls on the same tensors: more than twice an H100's L2 cache


class Machine:
    """The device, how to time a call on it, and until when."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse, self.device = rehearse, "cpu" if rehearse else "cuda"
        self.variant = variant("fp32" if rehearse else "bf16")
        self.batches = (1,) if rehearse else (64, 1024)
        self.deadline = float("inf")  # of time.monotonic()
        self.resident = self.highest = 0  # bytes of GPU memory in tensors: before the last timed call, at most in it
        # What may go wrong in one contender and not cost the others; in a rehearsal everything must go well.
        self.failures: tuple[type[Exception], ...] = () if rehearse else (Exception,)

    def left(self) -> float:
        """Seconds in which something new may start."""
        return self.deadline - time.monotonic()

    def clocks(self) -> str:
        """Clocks of multiprocessors and memory, and the power drawn, now; empty in a rehearsal."""
        return "" if self.rehearse else nvidia_smi("clocks.sm,clocks.mem,power.draw")

    def settle(self) -> None:
        """Forgets compiled code and garbage of the last contender, so that the next has the memory.

        Lost after an error that leaves the process without a GPU, or, before torch 2.14, with a recording that never
        ends (drawing says so): nothing measured from then on would count.
        """
        if not self.rehearse:
            try:
                torch.randn(1, device=self.device)
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise Lost(one_line(error)) from error
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()

    def milliseconds(self, *calls: Callable[[], object]) -> float:
        """Median time of a call; on a GPU out of a replayed CUDA graph of all of them, one after the other.

        Short calls have to come in numbers, each on tensors of its own (`turns`): a graph of one would measure its own
        launch, and tensors that wait in the cache. Their results are kept to the last, so none is written where
        another lay. `peak` is of the recording, not of the warmup, which may compile.
        """
        if self.rehearse:
            start = time.perf_counter()
            for call in calls:
                call()
            return 1e3 * (time.perf_counter() - start) / len(calls)

        def once() -> list[object]:
            return [call() for call in calls]

        recorder = self.recorder()
        for _ in range(WARMUP):
            recorder.warm_up(once)
        self.reset_peak()
        replay = recorder.record(once)
        self.note_peak()
        _elapsed(replay, 1)
        several = max(1, min(50, round(5 / max(_elapsed(replay, 1), 1e-3))))
        times, first = [], time.perf_counter()
        while len(times) < 10 or time.perf_counter() - first < TIMED:
            times.append(_elapsed(replay, several) / several)
        return statistics.median(times) / len(calls)

    def in_a_row(self, steps: Iterator[object]) -> float:
        """Milliseconds per step of many in a row, the host's part included, after some to warm up.

        `peak` is of the first ones after the warmup of a graph, in which it is recorded; later ones may begin an epoch.
        """
        def seconds(number: int) -> float:
            start = time.perf_counter()
            for _ in islice(steps, number):
                pass
            if not self.rehearse:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        seconds(WARMUP)
        self.reset_peak()
        seconds(2)
        self.note_peak()
        if self.rehearse:
            return 1e3 * seconds(1)
        seconds(20)
        number = max(20, min(500, round(20 / seconds(20))))  # a second, unless the step is long
        return 1e3 * seconds(number) / number

    def turns(self, inputs: dict, names: Iterable[str], moved: float) -> list[dict]:
        """Arguments for several calls, those of these names copied for each: as many as pass the cache by.

        moved: bytes that a call reads and writes.
        """
        number = 1 if self.rehearse else max(2, min(64, -(-RELOADED // max(1, int(moved)))))
        rotated = {name: inputs[name].detach() for name in names if name in inputs}
        return [inputs | {name: tensor.clone() for name, tensor in rotated.items()} for _ in range(number)]

    def reset_peak(self) -> None:
        """Lets `note_peak` count from here."""
        if not self.rehearse:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.resident = torch.cuda.memory_allocated()

    def note_peak(self) -> None:
        """Ends what `peak` is about."""
        if not self.rehearse:
            self.highest = torch.cuda.max_memory_allocated()

    def peak(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, float]:
        """The most GPU memory in tensors in the last timed call, data apart; nothing in a rehearsal.

        Data is what was there before it beside the model and the optimizer's state: images, logits, plans.
        """
        if self.rehearse:
            return {}
        data = self.resident - state_bytes(model, optimizer)
        return {"peak MB": (self.highest - data) / MEBI, "data MB": data / MEBI}

    @cached_property
    def tflops(self) -> float:
        """The rate of a large product in bf16, of 10^12 operations in a second."""
        n = 256 if self.rehearse else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2e-9 * n**3 / self._aside(lambda: a @ b)

    @cached_property
    def gigabytes_per_second(self) -> float:
        """The rate of a copy of one gibibyte, read and written."""
        x = torch.empty(MEBI if self.rehearse else 1024 * MEBI, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        return 2e-6 * x.numel() / self._aside(lambda: y.copy_(x))

    def _aside(self, call: Callable[[], object]) -> float:
        """`milliseconds`, but `peak` stays about the call before, of which a contender asks after the rates."""
        kept = self.resident, self.highest
        milliseconds = self.milliseconds(call)
        self.resident, self.highest = kept
        return milliseconds

    def shares(self, milliseconds: float, counts: Counts) -> dict[str, float]:
        """Which share of the measured rates a call reaches."""
        return counts.shares(milliseconds, self.tflops, self.gigabytes_per_second)

    def recorder(self) -> Recorder:
        """What steps are recorded with; in a rehearsal they are called again instead of replayed."""
        return Again() if self.rehearse else CudaGraphs(torch.device(self.device))

    def compiled(self, function: Callable) -> Callable:
        """The function as Inductor's best kernels (graphs come from the timing, for every contender alike)."""
        return function if self.rehearse else torch.compile(function, mode="max-autotune-no-cudagraphs", fullgraph=True)


class Again:
    """The Recorder of a rehearsal."""

    def warm_up(self, call: Callable[[], None]) -> None:
        """Runs the call."""
        call()

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """The call itself."""
        return call


def variant(name: str) -> Variant:
    """The column of the parity table of this name."""
    return next(column for column in VARIANTS if column.name == name)


def nvidia_smi(query: str) -> str:
    """What nvidia-smi says of the first GPU."""
    try:
        return subprocess.run(["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"], timeout=20,
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of parameters, their gradients, buffers and the optimizer's state."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    if optimizer is not None:
        tensors += [moment for state in optimizer.state.values() for moment in state.values()
                    if isinstance(moment, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def forward_backward(op: Callable, inputs: dict, grads: tuple[str, ...]) -> Callable[[], list[Tensor]]:
    """A call that gives the output and all gradients of an op on fixed inputs."""
    leaves = [inputs[name].requires_grad_() for name in grads]
    cotangents: list[Tensor] = []  # made in the first call: filling it is not the op's work

    def call() -> list[Tensor]:
        out = op(**inputs)
        if not cotangents:
            cotangents.append(torch.ones_like(out))
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangents)]

    return call


def _elapsed(replay: Callable[[], None], times: int) -> float:
    """Milliseconds of so many replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
