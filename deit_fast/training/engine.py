"""The loop: epochs of steps, evaluation, checkpoints, resuming. Students and teachers go through the same one.

A run is a function of its settings and seeds: the data order and every augmentation are pure functions of (data seed,
epoch, position), the learning rate of the step, dropout seeds of the update. What is left to save is the weights, the
optimizer, torch's RNG states, the position and the running sums, so a run killed at any moment and resumed ends with
the weights of an undisturbed one, bit for bit on the same CPU and thread count.

Nothing in a step waits for the device. The loss is summed there, and the first step whose loss is not finite is noted
there; both are read once per log interval, before a checkpoint and at the end of an epoch.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.errors import CheckpointError, TrainingError
from deit_fast.training import checkpoint, report
from deit_fast.training.config import OptimConfig, RunConfig
from deit_fast.training.metrics import Evaluation
from deit_fast.training.optim import ModelEma, Schedule, create_optimizer, load_optimizer
from deit_fast.training.progress import Log, Progress


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run is saved and can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class Job:
    """What a Trainer trains and where it writes.

    settings: what makes the run what it is, as plain values; a checkpoint with other settings is refused.
    metadata: plain values that go into the weights' files.
    seed: key of the first update's dropout masks when the fused ops draw them, None for PyTorch's own dropout.
    mixing_off: the epoch from which MixUp and CutMix are off; 0: never.
    """

    name: str
    model: nn.Module
    objective: Callable[[Tensor, Tensor | tuple[Tensor, Tensor], Tensor], Tensor]
    train: TrainLoader
    splits: dict[str, EvalLoader]
    num_classes: int
    output_dir: Path
    settings: dict
    metadata: dict = field(default_factory=dict)
    seed: int | None = None
    ema: ModelEma | None = None
    mixing_off: int = 0


class Trainer:
    """Trains a Job. `restore` first to go on from a checkpoint, then `fit`."""

    def __init__(self, job: Job, optim: OptimConfig, run: RunConfig, device: torch.device,
                 log: Log) -> None:
        self.job, self.optim, self.run, self.device, self.log = job, optim, run, device, log
        self.accumulate = optim.grad_accum_steps
        self.updates_per_epoch = len(job.train) // self.accumulate
        if self.updates_per_epoch == 0:
            raise TrainingError(f"an epoch of {len(job.train)} batches is shorter than --grad-accum-steps "
                                f"{self.accumulate}. Lower it, or --batch-size.")
        self.steps_per_epoch = self.updates_per_epoch * self.accumulate
        self.schedule = Schedule(optim, self.updates_per_epoch, job.train.batch_size)
        self.optimizer = create_optimizer(job.model, optim)
        self.forward = torch.compile(job.model) if run.torchcompile else job.model
        fp16 = run.amp and run.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.seed = None if job.seed is None else torch.tensor(job.seed, device=device)
        self.epoch = self.step = 0  # the position: `step` batches of `epoch` are done
        self.seconds = 0.0  # spent on the steps of this epoch
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)  # step of this epoch, -1: none
        self.history: list[dict] = []
        self.best: dict | None = None
        self._signal: int | None = None

    @property
    def last(self) -> Path:
        """The file of the latest state."""
        return self.job.output_dir / "last.pt"

    def fit(self) -> list[dict]:
        """The rows of metrics.csv, one per epoch, after training to the last epoch."""
        self._write_history()
        with self._signals(), Progress(self.optim.epochs, self.steps_per_epoch, self.job.train.batch_size, self.log) as bar:
            while self.epoch < self.optim.epochs:
                self._train_epoch(bar)
                row = self._evaluate_epoch()
                bar.epoch_done(row)
        return self.history

    def _train_epoch(self, bar: Progress) -> None:
        job = self.job
        if job.mixing_off and self.epoch >= job.mixing_off:
            job.train.recipe = replace(job.train.recipe, mixup=0.0, cutmix=0.0, cutmix_minmax=None)
        job.model.train()
        bar.epoch_starts(self.epoch, self.step)
        started = time.perf_counter()
        for images, targets in self._batches():
            self._train_step(images, targets)
            if self.step % self.run.log_interval == 0 or self.step == self.steps_per_epoch:
                self._check_finite()
                bar.advance(self.step, self.loss_sum.item() / self.step)
            if self.step % self.accumulate:
                continue  # gradients are under way: nothing to save here
            now = time.perf_counter()
            self.seconds, started = self.seconds + now - started, now
            if self._signal is not None:
                self._stop()
            if self.run.checkpoint_interval and self.step % self.run.checkpoint_interval == 0:
                self.save()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.job.train.epoch(self.epoch, self.step)
        for _ in range(self.step, self.steps_per_epoch):
            yield next(batches)

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        """One batch (B, 3, H, W), (B, K); the optimizer's step when enough gradients are gathered."""
        update = self.epoch * self.updates_per_epoch + self.step // self.accumulate
        with self._autocast():
            outputs = self.forward(images) if self.seed is None else self.forward(images, self.seed + self._batch_number())
            loss = self.job.objective(images, outputs, targets)
        self.scaler.scale(loss / self.accumulate).backward()
        self.loss_sum += loss.detach()
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, self.step, self.first_bad)
        self.step += 1
        if self.step % self.accumulate:
            return
        self.schedule.set(self.optimizer, update)
        if self.optim.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.job.model.parameters(), self.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.job.ema is not None:
            self.job.ema.update(self.job.model)

    def _batch_number(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def _evaluate_epoch(self) -> dict:
        """The epoch's row; writes best.pt, last.pt and metrics.csv, and moves to the next epoch."""
        self._check_finite()
        update = (self.epoch + 1) * self.updates_per_epoch - 1
        row = {"epoch": self.epoch + 1, "lr": self.schedule.lr(update), "train_loss": self.loss_sum.item() / self.step}
        row |= self.evaluate(self.forward)
        if self.job.ema is not None:
            row |= {f"ema_{name}": value for name, value in self.evaluate(self.job.ema.module).items()}
        row |= {"images_per_second": self.step * self.job.train.batch_size / max(self.seconds, 1e-9),
                "seconds": self.seconds}
        self.history.append(row)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.loss_sum.zero_()
        self._keep_best(row)
        self.save()
        self._write_history()
        return row

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of every split, with the split's name in front."""
        values = {}
        for split in self.job.splits:
            values |= {f"{split}_{name}": value for name, value in self.measure(model, split).compute().items()}
        return values

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> Evaluation:
        """The Evaluation of a model on one split."""
        evaluation = Evaluation(self.job.num_classes, self.device)
        training = model.training
        model.eval()
        with self._autocast():
            for images, labels in self.job.splits[split]:
                if self._signal is not None:
                    self._stop()
                evaluation.update(model(images), labels)
        model.train(training)
        return evaluation

    def _keep_best(self, row: dict) -> None:
        """Writes best.pt when the row is the best so far by validation, or always when there is no validation split."""
        metric = self.run.eval_metric
        name = f"{'ema_' if self.job.ema is not None else ''}val_{metric}"
        if name not in row:
            best = {"epoch": row["epoch"], "metric": "last epoch", "value": None}
        else:
            value = row[name]
            before = None if self.best is None else self.best["value"]
            if before is not None and (value >= before if metric == "loss" else value <= before):
                return
            best = {"epoch": row["epoch"], "metric": name, "value": value}
        self.best = best
        checkpoint.save(self.job.output_dir / "best.pt", self._weights() | {"best": best, "row": row})

    def _weights(self) -> dict:
        ema = self.job.ema
        return {"name": self.job.name, "num_classes": self.job.num_classes, "metadata": self.job.metadata,
                "model": {checkpoint.clean_name(key): value for key, value in self.job.model.state_dict().items()},
                "ema": None if ema is None else ema.state_dict()}

    def save(self) -> None:
        """Writes last.pt, unless the loss is no longer finite."""
        self._check_finite()
        checkpoint.save(self.last, self._weights() | {
            "settings": self.job.settings, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "epoch": self.epoch, "step": self.step, "seconds": self.seconds, "loss_sum": self.loss_sum.item(),
            "rng": checkpoint.rng_state(), "history": self.history, "best": self.best})

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint; CheckpointError when it is of another model or of other settings."""
        state = checkpoint.load(path, self.device)
        checkpoint.check_matches(path, state, name=self.job.name, num_classes=self.job.num_classes)
        if "settings" not in state:
            raise CheckpointError(f"{path} holds weights only and cannot be resumed. Use last.pt, or --finetune.")
        theirs, ours = state["settings"], self.job.settings
        different = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        if different:
            listed = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in sorted(different))
            raise CheckpointError(f"{path} is of a run with other settings ({listed}). Resume with the same ones, or start "
                                  "anew with another --output-dir.")
        self.job.model.load_state_dict(state["model"])
        if self.job.ema is not None:
            self.job.ema.load_state_dict(state["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.loss_sum.fill_(state["loss_sum"])
        self.history, self.best = state["history"], state["best"]
        checkpoint.set_rng_state(state["rng"])

    def _check_finite(self) -> None:
        bad = int(self.first_bad)
        if bad < 0:
            return
        update = self.epoch * self.updates_per_epoch + bad // self.accumulate
        good = f"The last good checkpoint is {self.last}" if self.last.exists() else "There is no checkpoint yet"
        scale = f", loss scale {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        raise TrainingError(f"the loss is not finite at step {bad + 1} of epoch {self.epoch + 1} (learning rate "
                            f"{self.schedule.lr(update):.3g}{scale}). {good}. Lower --lr, or limit gradients with "
                            "--clip-grad 1.0.")

    def _write_history(self) -> None:
        if self.history:
            report.write_metrics_csv(self.job.output_dir / "metrics.csv", self.history)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, getattr(torch, self.run.amp_dtype), enabled=self.run.amp)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM inside end the run after the step at hand; a second one ends it at once."""
        before = {}

        def remember(signum: int, _frame: object) -> None:
            self._signal = signum
            signal.signal(signum, before[signum])

        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, remember)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _stop(self) -> None:
        self.save()
        raise Interrupted(self._signal)
