"""The loop: epochs of steps, evaluation, checkpoints, resuming. Students and teachers go through the same one.

A run is a function of its settings and seeds: the data order and every augmentation are pure functions of (data seed,
epoch, position), the learning rate of the step, dropout seeds of the batch. What is left to save is the weights, the
optimizer, torch's RNG states, the position and the running sums, so a run killed at any moment and resumed ends with
the weights of an undisturbed one, bit for bit on the same CPU and thread count.

The device's sums are read once per log interval, before a checkpoint and at the end of an epoch; nothing else waits for
it. A state that is not finite never reaches a file.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import nn

from deit_fast.errors import CheckpointError, TrainingError
from deit_fast.training import checkpoint, graphs, report
from deit_fast.training.config import OptimConfig, RunConfig, unread_settings
from deit_fast.training.evaluation import measure
from deit_fast.training.interrupt import Interrupted, StopSignals
from deit_fast.training.job import Job
from deit_fast.training.metrics import Evaluation
from deit_fast.training.optim import Schedule, load_optimizer
from deit_fast.training.progress import Log, Progress
from deit_fast.training.steps import EagerSteps, Learner


def check_resumable(path: Path, state: dict, name: str, num_classes: int, settings: dict) -> None:
    """Raises CheckpointError unless `state`, read from `path`, is of a run of this model with these settings."""
    checkpoint.check_matches(path, state, name=name, num_classes=num_classes)
    if "settings" not in state:
        raise CheckpointError(f"{path} holds weights only and cannot be resumed. Use last.pt, or --finetune.")
    theirs = state["settings"]
    unread = unread_settings(settings, theirs)
    different = [key for key in settings if key not in unread and (key not in theirs or theirs[key] != settings[key])]
    if different:
        listed = "; ".join(f"{key}: {theirs.get(key)!r} there, {settings[key]!r} here" for key in sorted(different))
        raise CheckpointError(f"{path} is of a run with other settings ({listed}). Resume with the same ones, or start "
                              "anew with another --output-dir.")


class Trainer:
    """Trains a Job. `restore` first to go on from a checkpoint, then `fit`."""

    def __init__(self, job: Job, optim: OptimConfig, run: RunConfig, device: torch.device, log: Log) -> None:
        self.job, self.optim, self.run, self.device, self.log = job, optim, run, device, log
        self.accumulate = optim.grad_accum_steps
        self.updates_per_epoch = len(job.train) // self.accumulate
        if self.updates_per_epoch == 0:
            raise TrainingError(f"an epoch of {len(job.train)} batches is shorter than --grad-accum-steps "
                                f"{self.accumulate}. Lower it, or --batch-size.")
        self.steps_per_epoch = self.updates_per_epoch * self.accumulate
        self.schedule = Schedule(optim, self.updates_per_epoch, job.train.batch_size)
        self.learner = Learner(job, optim, run, device)
        self.steps = self._create_steps()
        self.signals = StopSignals()
        self.epoch = self.step = 0  # the position: `step` batches of `epoch` are done
        self.seconds = 0.0  # spent on the steps of this epoch
        self.history: list[dict] = []
        self.best: dict | None = None
        self.started, self.earlier_seconds = time.monotonic(), 0.0

    @property
    def last(self) -> Path:
        """The file of the latest state."""
        return self.job.output_dir / "last.pt"

    @property
    def wall_seconds(self) -> float:
        """How long the run has taken, with what it took before it was resumed."""
        return self.earlier_seconds + time.monotonic() - self.started

    def fit(self) -> list[dict]:
        """The rows of metrics.csv, one per epoch, after training to the last epoch."""
        self._write_history()
        last_row = self.history[-1] if self.history else None
        with self.signals, Progress(self.job.title, self.optim.epochs, self.steps_per_epoch, self.job.train.batch_size,
                                    self.log, last_row) as progress:
            while self.epoch < self.optim.epochs:
                self._train_epoch(progress)
                progress.evaluation_starts()
                progress.epoch_done(self._evaluate_epoch())
        return self.history

    def _create_steps(self) -> EagerSteps | graphs.GraphedSteps:
        """Replayed steps where they can be captured, else launched ones; says which, and why."""
        reason = graphs.why_not(self.job, self.run, self.device)
        if reason is None:
            self.log(f"{self.job.title}steps: replayed from a CUDA graph after {graphs.WARMUP} updates")
            return graphs.GraphedSteps(self.learner, self.schedule, graphs.CudaGraphs(self.device))
        self.log(f"{self.job.title}steps: launched one by one, without a CUDA graph: {reason}")
        return EagerSteps(self.learner, self.schedule)

    def _train_epoch(self, progress: Progress) -> None:
        self.job.model.train()
        progress.epoch_starts(self.epoch, self.step)
        clock = time.perf_counter()
        for _ in self.steps.epoch(self.epoch, self.step):
            self.step += 1
            progress.tick(self.step)
            if self.step % self.run.log_interval == 0 or self.step == self.steps_per_epoch:
                self._check_loss()
                progress.report(self.step, self.learner.loss_sum.item() / self.step)
            if self.step % self.accumulate:
                continue  # gradients are under way: nothing to save here
            self.seconds += time.perf_counter() - clock
            self._stop_if_asked()
            if self._checkpoint_is_due():
                self.save()
            clock = time.perf_counter()

    def _updates_done(self) -> int:
        return self.epoch * self.updates_per_epoch + self.step // self.accumulate

    def _checkpoint_is_due(self) -> bool:
        """Whether the last update completed another --checkpoint-interval of batches."""
        interval = self.run.checkpoint_interval
        return interval > 0 and self.step // interval > (self.step - self.accumulate) // interval

    def _evaluate_epoch(self) -> dict:
        """The epoch's row; writes best.pt, last.pt and metrics.csv, and moves to the next epoch."""
        self._check_state()
        row = {"epoch": self.epoch + 1, "lr": self.schedule.lr(self._updates_done() - 1),
               "train_loss": self.learner.loss_sum.item() / self.step}
        row |= self.evaluate(self.learner.forward)
        if self.job.ema is not None:
            row |= {f"ema_{name}": value for name, value in self.evaluate(self.job.ema.module).items()}
        row |= {"images_per_second": self.step * self.job.train.batch_size / max(self.seconds, 1e-9),
                "seconds": self.seconds}
        self.history.append(row)
        self._keep_best(row)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.learner.loss_sum.zero_()
        self.save()
        self._write_history()
        return row

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of every split, with the split's name in front."""
        values = {}
        for split in self.job.splits:
            values |= {f"{split}_{name}": value for name, value in self.measure(model, split).compute().items()}
        return values

    def measure(self, model: nn.Module, split: str) -> Evaluation:
        """The Evaluation of a model on one split; a signal ends it between two batches."""
        batches = (self._stop_if_asked() or batch for batch in self.job.splits[split])
        return measure(model, batches, self.job.num_classes, self.device, self.run)

    def _keep_best(self, row: dict) -> None:
        """Writes best.pt when the row is the best so far by validation, or always when there is no validation split."""
        metric = self.run.eval_metric
        name = f"{'ema_' if self.job.ema is not None else ''}val_{metric}"
        if name not in row:
            best = {"epoch": row["epoch"], "metric": "last epoch", "value": None}
        else:
            best = {"epoch": row["epoch"], "metric": name, "value": row[name]}
            sign, value = (-1.0 if metric == "loss" else 1.0), row[name]
            before = math.nan if self.best is None else self.best["value"]
            if self.best is not None and (math.isnan(value) or sign * value <= sign * before):
                return  # also when both are nan; any number is better than nan
        self.best = best
        checkpoint.save(self.job.output_dir / "best.pt", self._weights() | {"best": best, "row": row})

    def _weights(self) -> dict:
        ema = self.job.ema
        return {"name": self.job.name, "num_classes": self.job.num_classes, "metadata": self.job.metadata,
                "model": {checkpoint.clean_name(key): value for key, value in self.job.model.state_dict().items()},
                "ema": None if ema is None else ema.state_dict()}

    def save(self) -> None:
        """Writes last.pt; TrainingError instead when the state is not finite."""
        self._check_state()
        checkpoint.save(self.last, self._weights() | {
            "settings": self.job.settings, "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "epoch": self.epoch, "step": self.step, "seconds": self.seconds, "wall_seconds": self.wall_seconds,
            "loss_sum": self.learner.loss_sum.item(), "rng": checkpoint.rng_state(), "history": self.history,
            "best": self.best})

    def restore(self, path: Path, state: dict) -> None:
        """Continues from `state`, read from `path`; CheckpointError when it is of another model or settings."""
        check_resumable(path, state, self.job.name, self.job.num_classes, self.job.settings)
        if state["best"] is not None:
            self._adopt_best(path)
        self.job.model.load_state_dict(state["model"])
        if self.job.ema is not None:
            self.job.ema.load_state_dict(state["ema"])
        load_optimizer(self.learner.optimizer, state["optimizer"])
        self.learner.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.earlier_seconds = state["wall_seconds"]
        self.learner.loss_sum.fill_(state["loss_sum"])
        self.history, self.best = state["history"], state["best"]
        checkpoint.set_rng_state(state["rng"])

    def _adopt_best(self, path: Path) -> None:
        """Sees to it that best.pt, which a checkpoint counts on, is in the output folder."""
        ours, theirs = self.job.output_dir / "best.pt", path.parent / "best.pt"
        if theirs.exists() and theirs.resolve() != ours.resolve():
            checkpoint.save(ours, checkpoint.load(theirs))
        elif not ours.exists():
            raise CheckpointError(f"{path} counts on {theirs}, the weights of the best epoch so far, and that file "
                                  "is gone. Put it back, or start anew with another --output-dir.")

    def _check_loss(self) -> None:
        """Raises TrainingError when the loss of some step was not finite."""
        bad = int(self.learner.first_bad)
        if bad >= 0:
            epoch, step = divmod(bad, self.steps_per_epoch)
            self._diverged(f"the loss is not finite at step {step + 1} of epoch {epoch + 1}", bad)

    def _check_state(self) -> None:
        """Raises TrainingError when a loss was or a weight is not finite: the last update shows in no loss yet."""
        self._check_loss()
        tensors = [tensor for tensor in self.job.model.state_dict().values() if tensor.is_floating_point()]
        if not torch.stack(torch._foreach_norm(tensors, ord=torch.inf)).isfinite().all():
            self._diverged(f"the weights are not finite after step {self.step} of epoch {self.epoch + 1}",
                           self.epoch * self.steps_per_epoch + self.step - 1)

    def _diverged(self, fact: str, batch: int) -> None:
        lr = self.schedule.lr(batch // self.accumulate)
        scale = f", loss scale {self.learner.scaler.get_scale():g}" if self.learner.scaler.is_enabled() else ""
        good = f"The last good checkpoint is {self.last}" if self.last.exists() else "There is no checkpoint yet"
        raise TrainingError(f"{fact} (learning rate {lr:.3g}{scale}). {good}. {self.job.remedy}")

    def _write_history(self) -> None:
        if self.history:
            report.write_metrics_csv(self.job.output_dir / "metrics.csv", self.history)

    def _stop_if_asked(self) -> None:
        if self.signals.arrived is not None:
            self.save()
            raise Interrupted(self.signals.arrived)
