"""The loop on a toy problem: what a step computes, when it waits for the device, what it refuses to save."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from syncs import CountSyncs
from torch import nn

from deit_fast.data.augmentation import Recipe
from deit_fast.errors import TrainingError
from deit_fast.training import checkpoint
from deit_fast.training.config import OptimConfig, RunConfig
from deit_fast.training.engine import Trainer
from deit_fast.training.job import Job
from deit_fast.training.optim import ModelEma
from deit_fast.training.progress import Log

CPU = torch.device("cpu")
FEATURES, CLASSES = 6, 3


@dataclass
class Batches:
    """A loader of `steps` batches that are a function of (epoch, step); notes the recipe of every epoch."""

    steps: int = 4
    batch_size: int = 8
    recipe: Recipe = Recipe(mixup=0.8, cutmix=1.0)
    recipes: dict = field(default_factory=dict)
    bad_step: int | None = None  # of epoch 1

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        self.recipes[epoch] = self.recipe
        return (self.batch(epoch, step) for step in range(start, self.steps))

    def batch(self, epoch, step):
        generator = torch.Generator().manual_seed(1000 * epoch + step)
        images = torch.randn(self.batch_size, FEATURES, generator=generator)
        if self.bad_step == step and epoch == 1:
            images[0, 0] = math.nan
        labels = torch.randint(CLASSES, (self.batch_size,), generator=generator)
        return images, torch.eye(CLASSES)[labels]  # F.one_hot reads the largest label


class Sized:
    """An evaluation loader: three batches."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(7)
        for size in (8, 8, 5):
            yield torch.randn(size, FEATURES, generator=generator), torch.arange(size) % CLASSES


def make(tmp_path, loader=None, ema=False, mixing_off=0, objective=None, splits=("val", "test"), lines=None,
         **settings):
    """A Trainer of a linear model; settings go to OptimConfig or RunConfig by their names."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    job = Job("linear", model, objective or (lambda images, logits, targets: F.cross_entropy(logits, targets)),
              loader or Batches(), {name: Sized() for name in splits}, CLASSES, tmp_path, {"a": 1},
              ema=ModelEma(model, 0.5) if ema else None, mixing_off=mixing_off)
    optim = {"epochs": 2, "opt": "sgd", "momentum": 0.0, "lr": 0.1}
    run = {"log_interval": 100}
    for key, value in settings.items():
        (optim if key in OptimConfig.__dataclass_fields__ else run)[key] = value
    log = Log(Console(file=lines or io.StringIO(), width=200))
    return Trainer(job, OptimConfig(**optim), RunConfig(**run), CPU, log)


@pytest.mark.parametrize("settings", [{}, {"clip_grad": 1.0}, {"grad_accum_steps": 2}, {"opt": "adamw"}])
def test_steps_do_not_wait_for_the_device(tmp_path, settings):
    """Between two looks at the loss no value is read, with EMA, clipping and accumulation; a look reads few."""
    trainer = make(tmp_path, Batches(steps=12), ema=True, **settings)
    steps = trainer.steps.epoch(0, 0)
    with CountSyncs() as counting:
        for _ in range(12):
            next(steps)
        assert counting.reads == 0
        float(trainer.learner.loss_sum)
        assert counting.reads == 1, "the counter sees nothing"


def test_syncs_of_an_epoch_do_not_grow_with_its_steps(tmp_path):
    counts = []
    for steps in (4, 40):
        trainer = make(tmp_path / str(steps), Batches(steps=steps), epochs=1)
        with CountSyncs() as counting:
            trainer.fit()
        counts.append(counting.reads)
    assert counts[0] == counts[1] > 0


def test_accumulation_is_one_large_batch(tmp_path):
    """Two batches of 8 with accumulation make the step of one batch of 16; the learning rate and EMA move once."""
    two = make(tmp_path / "two", Batches(steps=2), grad_accum_steps=2, epochs=1, ema=True)
    before = copy.deepcopy(two.job.model)
    steps = two.steps.epoch(0, 0)
    next(steps)
    assert torch.equal(two.job.model.weight, before.weight)
    next(steps)
    images, targets = (torch.cat(parts) for parts in zip(two.job.train.batch(0, 0), two.job.train.batch(0, 1)))
    F.cross_entropy(before(images), targets).backward()
    expected = before.weight - 0.1 * before.weight.grad
    torch.testing.assert_close(two.job.model.weight, expected)
    torch.testing.assert_close(two.job.ema.module.weight, (before.weight + expected) / 2)
    assert int(two.job.ema.updates) == 1


def test_train_loss_and_rows(tmp_path):
    """train_loss is the mean over the epoch's steps; the row's columns are the contract's."""
    losses = []

    def objective(images, logits, targets):
        losses.append(F.cross_entropy(logits, targets).detach())
        return F.cross_entropy(logits, targets)

    row = make(tmp_path, objective=objective, epochs=1).fit()[0]
    assert row["train_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    names = ("loss", "top1", "top5", "auc", "f1", "precision", "recall")
    assert list(row) == ["epoch", "lr", "train_loss", *(f"val_{name}" for name in names),
                         *(f"test_{name}" for name in names), "images_per_second", "seconds"]


@pytest.mark.parametrize("interval", [1, 100])
def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path, interval):
    trainer = make(tmp_path, Batches(bad_step=2), checkpoint_interval=1, log_interval=interval, sched="cosine",
                   epochs=3)
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert "step 3 of epoch 2" in message and f"learning rate {trainer.schedule.lr(6):.3g}" in message
    assert str(tmp_path / "last.pt") in message and "--lr" in message
    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert state["history"] and len(state["history"]) == 1


def test_weights_that_overflow_after_a_finite_loss_are_not_saved(tmp_path):
    """The last update of an epoch breaks the weights: its loss was finite, and no later loss has shown it yet."""
    trainer = make(tmp_path, checkpoint_interval=1, epochs=2)
    trainer.fit()
    trainer.optim = OptimConfig(epochs=3)
    with torch.no_grad():
        trainer.job.model.bias[0] = math.nan
    good = (tmp_path / "last.pt").read_bytes(), (tmp_path / "best.pt").read_bytes()
    trainer.step = 4
    for write in (trainer.save, trainer._evaluate_epoch):
        with pytest.raises(TrainingError, match="weights are not finite after step 4 of epoch 3"):
            write()
    assert ((tmp_path / "last.pt").read_bytes(), (tmp_path / "best.pt").read_bytes()) == good


def test_nan_before_any_checkpoint(tmp_path):
    trainer = make(tmp_path, Batches(bad_step=0))
    trainer.epoch = 1
    with pytest.raises(TrainingError, match="There is no checkpoint yet"):
        trainer.fit()


def test_mixing_stops_at_its_epoch_and_starts_again(tmp_path):
    """The loader keeps its recipe: a run that starts anew with the same loader mixes again."""
    loader = Batches()
    make(tmp_path / "a", loader, mixing_off=1, epochs=3).fit()
    mixing = {epoch: (recipe.mixup, recipe.cutmix) for epoch, recipe in loader.recipes.items()}
    assert mixing == {0: (0.8, 1.0), 1: (0.0, 0.0), 2: (0.0, 0.0)}
    make(tmp_path / "b", loader, epochs=1).fit()
    assert loader.recipe.mixup == loader.recipes[0].mixup == 0.8


def test_mixing_off_reaches_the_targets():
    """With the real loader: one-hot targets from that epoch on, mixed ones before."""
    from deit_fast.data.loader import TrainLoader
    from deit_fast.data.split import Split

    split = Split(torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8), torch.arange(32) % CLASSES)
    loader = TrainLoader(split, Recipe(mixup=0.8), (0.5,) * 3, (0.5,) * 3, CLASSES, 8)
    trainer = make(None, loader, mixing_off=1)
    for epoch, whole in ((0, False), (1, True), (0, False)):
        targets = torch.cat([targets for _, targets in trainer.steps._batches(epoch, 0)])
        assert bool((targets.max(dim=1).values == 1).all()) == whole


@pytest.mark.parametrize(("metric", "values", "best"), [
    ("top1", [0.3, 0.5, 0.5, 0.4], 2), ("loss", [2.0, 1.0, 3.0, 1.0], 2), ("loss", [math.nan, 2.0, math.nan, 3.0], 2),
    ("auc", [0.7, math.nan, 0.8, math.nan], 3), ("loss", [math.nan, math.nan], 1)])
def test_best_epoch(tmp_path, metric, values, best):
    """The first of the best; nan is never better than a number, and any number is better than nan."""
    trainer = make(tmp_path, eval_metric=metric)
    for epoch, value in enumerate(values, start=1):
        trainer._keep_best({"epoch": epoch, f"val_{metric}": value})
    assert trainer.best["epoch"] == best == checkpoint.load(tmp_path / "best.pt")["row"]["epoch"]


def test_best_epoch_without_validation_is_the_last_and_with_ema_the_averages(tmp_path):
    trainer = make(tmp_path / "a", splits=("test",), epochs=2)
    trainer.fit()
    assert trainer.best == {"epoch": 2, "metric": "last epoch", "value": None}
    trainer = make(tmp_path / "b", ema=True, epochs=1)
    row = trainer.fit()[0]
    assert trainer.best["metric"] == "ema_val_top1" and trainer.best["value"] == row["ema_val_top1"]


@pytest.mark.parametrize(("accumulate", "interval", "saved"), [
    (1, 3, [3, 6]), (2, 3, [4, 6]), (4, 2, [4, 8]), (1, 0, [])])
def test_checkpoints_come_after_updates(tmp_path, monkeypatch, accumulate, interval, saved):
    """At the first whole update behind each interval, never with gradients under way."""
    trainer = make(tmp_path, Batches(steps=8), grad_accum_steps=accumulate, checkpoint_interval=interval, epochs=1)
    steps = []
    monkeypatch.setattr(trainer, "save", lambda: steps.append(trainer.step))
    trainer.fit()
    assert [step for step in steps if step] == saved


def test_epoch_shorter_than_accumulation(tmp_path):
    with pytest.raises(TrainingError, match="grad-accum-steps 5"):
        make(tmp_path, grad_accum_steps=5)


def test_evaluation_uses_evaluation_mode_and_every_image(tmp_path):
    trainer = make(tmp_path)
    model = nn.Sequential(trainer.job.model, nn.Dropout(0.9)).train()
    evaluation = trainer.measure(model, "val")
    assert model.training and evaluation.details()["samples"] == 21
    logits = torch.cat([trainer.job.model(images) for images, _ in Sized()])
    labels = torch.cat([labels for _, labels in Sized()])
    assert evaluation.compute()["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


class TestProgress:
    def test_text_is_printed_as_it_is(self):
        """rich would turn the `:one:` of a data set called "folder:one" into a picture of the digit."""
        console = Console(file=io.StringIO(), soft_wrap=True)
        Log(console)("test split of folder:one: top-1 [bold]0.9[/bold]")
        assert console.file.getvalue() == "test split of folder:one: top-1 [bold]0.9[/bold]\n"

    def test_plain_lines(self, tmp_path):
        """Where the output is no terminal: a line per log interval and one per epoch, nothing that moves the cursor."""
        lines = io.StringIO()
        make(tmp_path, lines=lines, log_interval=2, epochs=2).fit()
        text = lines.getvalue()
        assert "\x1b" not in text and "\r" not in text
        steps = [line for line in text.splitlines() if "  step " in line]
        assert [line.split("  ")[1] for line in steps] == ["step 2/4", "step 4/4"] * 2
        assert all(word in line for line in steps for word in ("epoch ", "loss ", "top-1 ", "img/s", "ETA "))
        assert "top-1 -" in steps[0] and "top-1 0." in steps[2]  # of the last evaluation

    def test_goes_on_after_a_resume(self, tmp_path):
        """Epoch, step and the last top-1 are those of the whole run, not of this process."""
        first = make(tmp_path, log_interval=2, epochs=1)
        top1 = first.fit()[0]["val_top1"]
        lines = io.StringIO()
        second = make(tmp_path, lines=lines, log_interval=1, epochs=2)
        second.restore(second.last, checkpoint.load(second.last))
        second.fit()
        first_step = lines.getvalue().splitlines()[1]  # after the line that says how steps are run
        assert first_step.startswith("epoch 2/2  step 1/4  loss ") and f"top-1 {top1:.4f}" in first_step

    def test_bar_on_a_terminal(self, tmp_path):
        screen = io.StringIO()
        trainer = make(tmp_path, log_interval=2, epochs=2)
        trainer.log = Log(Console(file=screen, width=110, force_terminal=True, color_system=None))
        trainer.fit()
        text = screen.getvalue()
        assert "\x1b[" in text, "nothing is redrawn"
        for word in ("epoch 1/2", "epoch 2/2", "4/4", "loss ", "top-1 ", "img/s", "ETA "):
            assert word in text, word
