"""A recorded step computes what an eager one does, bit for bit.

On a CPU it is replayed from a tape (tape.py), which takes the place of a CUDA graph: the very function that a GPU would
capture, over the same static buffers, with the same warmup. On a GPU the same cases run with real graphs.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from commands import TINY, VIT
from rich.console import Console
from tape import Tapes
from test_resume import assert_same_run
from torch import nn

import deit_fast
from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import load_dataset
from deit_fast.data.loader import TrainLoader
from deit_fast.train import main
from deit_fast.training import graphs
from deit_fast.training.build import dropout_seed
from deit_fast.training.config import DistillationConfig, OptimConfig, RunConfig
from deit_fast.training.distillation import Objective, Teacher, TeacherInput
from deit_fast.training.engine import Trainer
from deit_fast.training.job import Job
from deit_fast.training.optim import ModelEma
from deit_fast.training.progress import Log
from needs import needs_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
K, EPOCHS = 10, 2
FULL = Recipe(crop_pad=1, hflip=0.5, brightness=0.2, reprob=0.5, recount=2, mixup=0.8, cutmix=1.0, mixup_mode="elem")


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", input_size=8, log=lambda _: None)


def network() -> nn.Module:
    """A convolutional network with everything that keeps state in training: batch norm counts and averages."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(8 * 36, K))


def make(data, *, graphed, device=CPU, model="vit_nano_patch4_32", recipe=FULL, seeded=False, ema=False, teacher=None,
         mixing_off=0, model_options=None, **settings) -> tuple[Trainer, Tapes | graphs.CudaGraphs]:
    """A Trainer on the digits, and what records its steps; settings go to OptimConfig or RunConfig."""
    torch.manual_seed(0)
    loader = TrainLoader(data.train, recipe, data.mean, data.std, K, 128, smoothing=0.1, device=device)
    if model == "network":
        net, objective = network(), lambda _images, logits, targets: nn.functional.cross_entropy(logits, targets)
    else:
        net = deit_fast.create_model(model, K, img_size=8, depth=2, **(model_options or {}))
        same = TeacherInput(data.mean, data.std, data.mean, data.std)
        objective = Objective(net.tokens, DistillationConfig(), Teacher(network(), same).to(device))
    table = torch.randn(EPOCHS, loader.images_per_epoch, K).half().to(device)
    net.to(device)
    job = Job("m", net, objective, loader, {}, K, None, {}, seed=dropout_seed(3, device) if seeded else None,
              ema=ModelEma(net, 0.9, warmup=True) if ema else None, mixing_off=mixing_off,
              teacher_logits=table.__getitem__ if teacher == "stored" else None)
    optim = {"epochs": EPOCHS}
    run = {}
    for key, value in settings.items():
        (optim if key in OptimConfig.__dataclass_fields__ else run)[key] = value
    trainer = Trainer(job, OptimConfig(**optim), RunConfig(cuda_graphs=False, **run), device, silent())
    recorder = Tapes() if device == CPU else graphs.CudaGraphs(device)
    if graphed:
        trainer.steps = graphs.GraphedSteps(trainer.learner, trainer.schedule, recorder)
    net.train()
    torch.manual_seed(5)
    return trainer, recorder


def silent() -> Log:
    return Log(Console(file=io.StringIO()))


def train(trainer: Trainer, start: int = 0, refused: bool = False) -> list[float]:
    """The running sum of the loss after each step of EPOCHS epochs; refused: whether a recording must have failed."""
    sums = [trainer.learner.loss_sum.item() for epoch in range(EPOCHS)
            for _ in trainer.steps.epoch(epoch, start if epoch == 0 else 0)]
    reason = getattr(trainer.steps, "refused", None)
    assert (reason is not None) == refused, reason
    return sums


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, buffers, average, moments and random state."""
    learner = trainer.learner
    tensors = dict(learner.job.model.state_dict()) | {"random": torch.get_rng_state()}
    if learner.job.ema is not None:
        tensors |= {f"ema {name}": value for name, value in learner.job.ema.module.state_dict().items()}
    for number, moments in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"{number} {name}": value for name, value in moments.items() if value is not None}
    return tensors


CASES = {
    "PyTorch's dropout": dict(model_options=dict(drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2)),
    "seeded dropout": dict(seeded=True, model_options=dict(drop_rate=0.1, attn_drop_rate=0.1)),
    "schedule, average, clipping": dict(ema=True, sched="cosine", warmup_epochs=0.7, opt="adamw", weight_decay=0.05,
                                        clip_grad=0.5),
    "accumulation": dict(grad_accum_steps=2, ema=True, sched="step", decay_epochs=0.5,
                         model_options=dict(drop_rate=0.1)),
    "accumulation, batches left over": dict(grad_accum_steps=3, opt="sgd", momentum=0.9),
    "teacher online": dict(model="deit_nano_distilled_patch4_32", mixing_off=1),
    "teacher stored": dict(model="deit_nano_distilled_patch4_32", teacher="stored", seeded=True, grad_accum_steps=2,
                           model_options=dict(drop_rate=0.1)),
    "two class tokens, nothing drawn": dict(model="deit_nano_distilled_patch4_32", recipe=Recipe(),
                                            model_options=dict(tokens="cls+cls")),
    "training a teacher": dict(model="network", opt="sgd", momentum=0.9, ema=True, weight_decay=5e-4),
    "bfloat16": dict(amp=True, seeded=True, model_options=dict(drop_rate=0.1)),
}


@contextmanager
def backends(device: torch.device, seeded: bool) -> Iterator[None]:
    """Seeded dropout needs native kernels; on a CPU `augment` does too, for plain PyTorch checks its values there."""
    native = "cpu" if device == CPU else "triton"
    with deit_fast.use_backend(native if seeded else "reference", augment="cpu" if device == CPU else "reference",
                               distillation_loss="triton" if seeded and device != CPU else "reference"):
        yield




@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_eager_steps(data, name):
    """Every loss, and at the end weights, moments, averages, buffers and the random state."""
    compare_with_eager(data, CPU, CASES[name])


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_eager_steps_on_a_gpu(data, name, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        compare_with_eager(data, CUDA, CASES[name])
    finally:
        torch.use_deterministic_algorithms(False)


def compare_with_eager(data, device: torch.device, case: dict) -> None:
    with backends(device, case.get("seeded", False)):
        eager, _ = make(data, graphed=False, device=device, **case)
        expected, after = train(eager), state(eager)
        graphed, recorder = make(data, graphed=True, device=device, **case)
        losses, ours = train(graphed), state(graphed)
    assert losses == expected
    assert ours.keys() == after.keys() and all(torch.equal(ours[key], after[key]) for key in ours)
    assert len(graphed.steps.replays) == min(graphed.accumulate, 2), "nothing was recorded"
    if device == CPU:
        assert recorder.warm == graphs.WARMUP * graphed.accumulate
        assert recorder.replayed == len(losses) - recorder.warm, "a recording counts as a step"


def test_started_within_an_epoch(data):
    """From batch 4 on, as a resumed run does: the rows are those of the later batches."""
    case = dict(grad_accum_steps=2, ema=True, sched="cosine")
    with backends(CPU, seeded=False):
        eager, graphed = (train(make(data, graphed=which, **case)[0], 4) for which in (False, True))
    assert eager == graphed and len(eager) == 16


def test_a_loss_that_is_not_finite_is_noted_in_a_replay(data):
    """With the number of its batch, which names epoch and step in the message."""
    with backends(CPU, seeded=False):
        trainer, tapes = make(data, graphed=True)
        for done, _ in enumerate(trainer.steps.epoch(0, 0), start=1):
            if done in (7, 8):
                with torch.no_grad():
                    trainer.job.model.head.bias[0] = float("nan")
    assert tapes.replayed == 7 and int(trainer.learner.first_bad) == 7


def reads(_images, logits, targets):
    """A loss that looks at itself on the host, which no graph holds."""
    loss = nn.functional.cross_entropy(logits, targets)
    return loss * (1.0 if loss.item() > 0 else 2.0)


def test_syncs_in_a_step_cannot_be_recorded(data):
    """The tape refuses them, so the other tests prove that there are none."""
    def copies(_images, logits, targets):
        return nn.functional.cross_entropy(logits * torch.tensor([2.0]), targets)

    for objective, reason in ((reads, "_local_scalar_dense"), (copies, "lift_fresh")):
        trainer, _ = make(data, graphed=True)
        trainer.job.objective = objective
        with backends(CPU, seeded=False):
            train(trainer, refused=True)
        assert reason in trainer.steps.refused


def test_reference_augmentation_copies_nothing_from_the_host(data, monkeypatch):
    """Plain PyTorch serves `augment` on GPUs, where its constants must not come from host memory."""
    module = sys.modules["deit_fast.ops.augment"]  # under this name the package has the op
    monkeypatch.setattr(module, "check_values", lambda *_: None)  # reads values, on a CPU only
    with deit_fast.use_backend("reference"):
        eager, graphed = (train(make(data, graphed=which)[0]) for which in (False, True))
    assert eager == graphed


def test_row_holds_every_tensor():
    """Columns of every dtype come back from a row, each at an aligned address."""
    columns = {"a": torch.arange(6).view(2, 3), "b": torch.tensor([[True], [False]]),
               "c": torch.randn(2, 5, 1).half(), "d": torch.tensor([1.5, -2.5], dtype=torch.float64),
               "e": torch.zeros(2, 0, 4, dtype=torch.int32), "f": torch.randn(2, 7)}
    layout = graphs.Layout(columns)
    table = layout.table(columns)
    for step in range(2):
        views = layout.views(table[step].clone())
        assert views.keys() == columns.keys()
        for name, view in views.items():
            assert torch.equal(view, columns[name][step]) and view.dtype == columns[name].dtype
            assert view.storage_offset() * view.element_size() % graphs.ALIGNMENT == 0
    with pytest.raises(AssertionError, match="f"):
        layout.table(columns | {"f": torch.randn(2, 8)})


@pytest.fixture
def on_tapes(monkeypatch):
    """Commands record their steps on tapes; the list of them."""
    made = []

    def recorder(_device):
        made.append(Tapes())
        return made[-1]

    monkeypatch.setattr(graphs, "why_not", lambda job, run, device: None if run.cuda_graphs else "--no-cuda-graphs")
    monkeypatch.setattr(graphs, "CudaGraphs", recorder)
    return made


RICH = (*VIT, "--fused", "--epochs", "2", "--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2",
        "--checkpoint-interval", "3", "--drop-path", "0.1", "--attn-drop", "0.1", "--crop-pad", "1", "--color-jitter",
        "0.2", "--reprob", "0.2", "--mixup", "0.8", "--cutmix", "1", "--opt", "adamw", "--weight-decay", "0.05",
        "--sched", "cosine", "--warmup-epochs", "0.5", "--clip-grad", "1")


def test_command_with_and_without(on_tapes, tmp_path, monkeypatch, capsys):
    """The run folder is the same; a run stopped within an epoch goes on, with graphs or without, to the same end."""
    assert main([*RICH, "--output-dir", str(tmp_path / "eager"), "--no-cuda-graphs"]) == 0
    assert "without a CUDA graph: --no-cuda-graphs" in capsys.readouterr().out and not on_tapes
    assert main([*RICH, "--output-dir", str(tmp_path / "graphs")]) == 0
    assert "replayed from a CUDA graph" in capsys.readouterr().out
    assert on_tapes[0].replayed == 20 - 6 and len(on_tapes[0].recorded) == 2
    assert_same_run(tmp_path / "graphs", tmp_path / "eager")

    class Stop(Exception):
        pass

    for folder, first, then in (("a", [], []), ("b", ["--no-cuda-graphs"], [])):
        output, steps = str(tmp_path / folder), iter(range(100))
        tick = "deit_fast.training.progress.Progress.tick"

        def stop(*_):
            if next(steps) == 8:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(tick, stop)
            with pytest.raises(Stop):
                main([*RICH, "--output-dir", output, *first])
        assert main([*RICH, "--output-dir", output, *then, "--resume"]) == 0
        assert "0 epochs and 6 of 10 steps done" in capsys.readouterr().out
        assert_same_run(tmp_path / folder, tmp_path / "eager")


def test_teacher_and_student_from_tapes(on_tapes, tmp_path, capsys):
    """The teacher's training is recorded too, and a student that reads stored logits ends as its eager twin."""
    flags = ("--preset", "report-deit", *TINY, "--fused", "--epochs", "1", "--teacher-model", "shufflenet_v2_x0_5",
             "--teacher-epochs", "1", "--opt", "adamw", "--weight-decay", "0.01")
    for name, more in (("eager", ["--no-cuda-graphs"]), ("graphs", [])):
        cache = ["--teacher-cache", str(tmp_path / f"cache {name}")]
        assert main([*flags, *cache, *more, "--output-dir", str(tmp_path / name)]) == 0
    assert "teacher steps: replayed" in capsys.readouterr().out and len(on_tapes) == 2
    assert all(tapes.replayed == 7 for tapes in on_tapes)
    assert_same_run(tmp_path / "graphs", tmp_path / "eager")


def test_why_not(data):
    """One reason for each thing that no graph can hold, and None on a GPU otherwise."""
    job = make(data, graphed=False)[0].job
    run = RunConfig(fused=True, amp=True)
    assert graphs.why_not(job, run, CUDA) is None
    assert graphs.why_not(job, run, CPU) == "the device is cpu"
    assert graphs.why_not(job, RunConfig(cuda_graphs=False), CUDA) == "--no-cuda-graphs"
    assert "float16" in graphs.why_not(job, RunConfig(amp=True, amp_dtype="float16"), CUDA)
    assert graphs.why_not(job, RunConfig(amp_dtype="float16"), CUDA) is None, "--amp is off"
    assert "--torchcompile" in graphs.why_not(job, RunConfig(torchcompile=True), CUDA)
    policy = TrainLoader(data.train, Recipe(), data.mean, data.std, K, 64, auto_augment="ra")
    assert "from the host" in graphs.why_not(replace(job, train=policy), run, CUDA)
    checkpointing = copy.deepcopy(job.model)
    checkpointing.set_grad_checkpointing()
    assert "--grad-checkpointing" in graphs.why_not(replace(job, model=checkpointing), run, CUDA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEIT_FAST_CHECK", "1")
        assert "DEIT_FAST_CHECK" in graphs.why_not(job, run, CUDA)


def test_reason_is_printed_once(data):
    lines = io.StringIO()
    trainer, _ = make(data, graphed=False)
    Trainer(trainer.job, OptimConfig(), RunConfig(), CPU, Log(Console(file=lines, width=200)))
    assert lines.getvalue().strip() == "steps: launched one by one, without a CUDA graph: the device is cpu"
