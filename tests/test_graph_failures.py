"""Where recording a step fails, training goes on, step by step, as if nobody had tried; on a tape and on a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tape import Tapes
from test_graphs import CASES, CPU, CUDA, EPOCHS, backends, compare_with_eager, make, reads, state, train
from test_graphs import data  # noqa: F401  (a fixture)

from deit_fast.errors import TrainingError
from deit_fast.training import graphs
from needs import needs_gpu

# Where the step reads a value on the host, after how many batches there is an update, and how many steps are replayed:
# of ("update", 2) the graph without an update is recorded, and given up after one replay.
REFUSED = [("forward", 1, 0), ("update", 1, 0), ("update", 2, 1)]


@pytest.mark.parametrize(("where", "accumulate", "replayed"), REFUSED)
def test_goes_on_after_a_recording_that_failed(data, where, accumulate, replayed, capsys):
    """With every batch, draw and gradient as in eager steps, and one line that says why."""
    recorder = compare_refused(data, CPU, where, accumulate, capsys)
    assert (recorder.warm, recorder.replayed) == (EPOCHS * 10 - replayed, replayed)


@needs_gpu
@pytest.mark.skipif(not graphs.UNWINDS, reason=f"torch {torch.__version__} leaves a failed capture half "
                    "open, which breaks later tests; what is done there: test_what_a_failed_capture_leaves")
@pytest.mark.parametrize(("where", "accumulate", "replayed"), REFUSED)
def test_goes_on_after_a_recording_that_failed_on_a_gpu(data, where, accumulate, replayed, capsys, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        compare_refused(data, CUDA, where, accumulate, capsys)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        compare_with_eager(data, CUDA, CASES["PyTorch's dropout"])  # another job's steps can still be captured
    finally:
        torch.use_deterministic_algorithms(False)


def compare_refused(data, device: torch.device, where: str, accumulate: int, capsys) -> Tapes | graphs.CudaGraphs:
    case = dict(grad_accum_steps=accumulate, ema=True, model_options=dict(drop_rate=0.1, drop_path_rate=0.2))
    ends = []
    for graphed in (False, True):
        trainer, recorder = make(data, graphed=graphed, device=device, **case)
        if where == "forward":
            trainer.job.objective = reads
        else:  # gradients are there, the weights are not yet changed
            def pause(*_, loss_sum=trainer.learner.loss_sum):
                loss_sum.item()

            trainer.learner.optimizer.register_step_pre_hook(pause)
        with backends(device, seeded=False):
            ends.append((train(trainer, refused=graphed), state(trainer)))
    (expected, after), (losses, ours) = ends
    assert losses == expected
    assert ours.keys() == after.keys() and all(torch.equal(ours[key], after[key]) for key in ours)
    lines = capsys.readouterr().err
    assert lines.count("without a CUDA graph: ") == 1 and trainer.steps.refused in lines and not trainer.steps.replays
    return recorder


class Cuda:
    """torch.cuda as `CudaGraphs` uses it. The end of an invalid capture raises and leaves the capture's stream current.
    """

    def __init__(self, valid: bool, alive: bool = True) -> None:
        self.valid, self.alive, self.here, self.calls = valid, alive, "default", []

    def Stream(self):
        return "side"

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        return SimpleNamespace(replay="replay", reset=lambda: self.calls.append("reset"))

    def current_stream(self):
        return self.here

    def synchronize(self):
        self.calls.append(f"synchronize {self.here}")
        if not self.alive:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    @contextmanager
    def device(self, _device):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    @contextmanager
    def graph(self, _graph, pool, stream):
        before, self.here = self.here, stream
        try:
            yield
        finally:
            if not self.valid:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.here = before


def test_what_a_failed_capture_leaves(monkeypatch):
    """The stream of before, a graph that was reset, the first error's words; other exceptions pass."""
    def record(valid, error=None, alive=True):
        def call():
            if error is not None:
                raise error

        cuda = Cuda(valid, alive)
        monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))
        try:
            return graphs.CudaGraphs(CUDA).record(call), cuda
        except (graphs.CannotCapture, RuntimeError, TrainingError, KeyboardInterrupt) as raised:
            assert cuda.here == "default"
            return raised, cuda

    monkeypatch.setattr(graphs, "UNWINDS", True)
    assert record(valid=True)[0] == "replay"
    refusal = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
    for valid in (True, False):
        raised, cuda = record(valid, refusal)
        assert isinstance(raised, graphs.CannotCapture) and cuda.calls == ["reset", "synchronize default"]
        assert str(raised) == "CUDA error: operation not permitted when stream is capturing"
        assert isinstance(record(valid, KeyboardInterrupt())[0], KeyboardInterrupt)
    raised, _ = record(valid=False)  # made invalid by another thread
    assert isinstance(raised, graphs.CannotCapture) and "previous error" in str(raised)
    raised, _ = record(False, refusal, alive=False)
    assert isinstance(raised, RuntimeError) and "illegal memory access" in str(raised)
    monkeypatch.setattr(graphs, "UNWINDS", False)
    raised, _ = record(False, refusal)
    assert isinstance(raised, TrainingError) and "not permitted when stream is capturing. Train with" in str(raised)
