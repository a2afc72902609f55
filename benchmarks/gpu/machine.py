"""The device of a check, and how a call is timed on it: by replaying a CUDA graph of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cases import VARIANTS
from deit_fast.training.graphs import CudaGraphs, Recorder

Row = tuple[str, dict]  # the name of a line, and its figures


class Machine:
    """The device and how to time a call on it."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse, self.device = rehearse, "cpu" if rehearse else "cuda"
        self.variant = next(v for v in VARIANTS if v.name == ("fp32" if rehearse else "bf16"))
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

    def reset_peak(self) -> None:
        """Lets `peak` count from here."""
        if not self.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """The most GPU memory in tensors since `reset_peak`; nothing in a rehearsal."""
        return {} if self.rehearse else {"peak MB": torch.cuda.max_memory_allocated() / 2**20}

    def recorder(self) -> Recorder:
        """What a Trainer records its steps with; in a rehearsal they are called again instead of replayed."""
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


def forward_backward(op: Callable, inputs: dict, grads: tuple[str, ...]) -> Callable[[], list[Tensor]]:
    """A call that gives the output and all gradients of an op on fixed inputs."""
    leaves = [inputs[name].requires_grad_() for name in grads]

    def call() -> list[Tensor]:
        out = op(**inputs)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return call
