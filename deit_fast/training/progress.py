"""What a user sees of a running training: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

REDRAW_SECONDS = 0.1


class Log:
    """Prints lines, above the live bar where there is one: `log("text")`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)

    def __call__(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Progress:
    """Epoch, loss, top-1 of the last evaluation, images per second and time left of a run; a context manager.

    Loss and top-1 are those that were read last, and between two reports the steps counted are those handed to the
    device: nothing here waits for it.
    """

    def __init__(self, title: str, epochs: int, steps_per_epoch: int, batch_size: int, log: Log,
                 last_row: dict | None = None) -> None:
        self.title, self.epochs, self.steps, self.batch_size, self.log = title, epochs, steps_per_epoch, batch_size, log
        self.epoch = 0
        self.top1 = None if last_row is None else last_row[_top1(last_row)]
        self.loss: float | None = None
        self.rate = 0.0  # images per second since the last report
        self.evaluation_seconds = 0.0  # of the last evaluation
        self.mark = (time.perf_counter(), 0)  # (moment, step) of the last report
        self.drawn = 0.0
        self.bar = None
        if log.console.is_terminal:
            self.bar = Bar(TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(),
                           TextColumn("{task.fields[words]}"), console=log.console, transient=True)
            self.task = self.bar.add_task(title, total=steps_per_epoch, visible=False, words="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.bar:
            self.bar.stop()

    def epoch_starts(self, epoch: int, step: int) -> None:
        """Epoch `epoch` (from 0) goes on from `step`."""
        self.epoch, self.mark = epoch, (time.perf_counter(), step)
        if self.bar:
            self.bar.reset(self.task, completed=step, visible=True, description=self._name(), words=self._words(step))

    def tick(self, step: int) -> None:
        """`step` batches of the epoch are handed to the device."""
        now = time.perf_counter()
        if self.bar and now - self.drawn > REDRAW_SECONDS:
            self.drawn = now
            self._measure_rate(now, step)
            self.bar.update(self.task, completed=step, words=self._words(step))

    def report(self, step: int, loss: float) -> None:
        """`step` batches of the epoch are done, with this mean loss."""
        now = time.perf_counter()
        self._measure_rate(now, step)
        self.loss, self.mark = loss, (now, step)
        if self.bar:
            self.bar.update(self.task, completed=step, words=self._words(step))
        else:
            self.log(f"{self._name()}  step {step}/{self.steps}  {self._words(step)}")

    def _measure_rate(self, now: float, step: int) -> None:
        moment, before = self.mark
        if step > before:
            self.rate = (step - before) * self.batch_size / max(now - moment, 1e-9)

    def evaluation_starts(self) -> None:
        """The steps of the epoch are done; its evaluation comes next."""
        self.mark = (time.perf_counter(), self.steps)
        if self.bar:
            self.bar.update(self.task, completed=self.steps, words="evaluating")

    def epoch_done(self, row: dict) -> None:
        """An epoch's row of metrics."""
        self.evaluation_seconds = time.perf_counter() - self.mark[0]
        self.top1 = row[_top1(row)]
        split = "val" if "val_top1" in row else "test"
        line = (f"{self._name()} done: train loss {row['train_loss']:.4f}, {split} loss {row[f'{split}_loss']:.4f}, "
                f"top-1 {row[f'{split}_top1']:.4f}, top-5 {row[f'{split}_top5']:.4f}, AUC {row[f'{split}_auc']:.4f}, "
                f"F1 {row[f'{split}_f1']:.4f}")
        if f"ema_{split}_top1" in row:
            line += f", EMA top-1 {row[f'ema_{split}_top1']:.4f}"
        self.log(f"{line}  ({row['images_per_second']:,.0f} img/s, {duration(row['seconds'])})")

    def _name(self) -> str:
        return f"{self.title}epoch {self.epoch + 1}/{self.epochs}"

    def _words(self, step: int) -> str:
        """Loss, top-1, speed and time left; a dash for what is not known yet."""
        loss, top1 = ("-" if value is None else f"{value:.4f}" for value in (self.loss, self.top1))
        if self.rate == 0.0:
            return f"loss {loss}  top-1 {top1}  - img/s  ETA -"
        epochs = self.epochs - self.epoch
        images = (epochs * self.steps - step) * self.batch_size
        left = duration(images / self.rate + epochs * self.evaluation_seconds)
        return f"loss {loss}  top-1 {top1}  {self.rate:,.0f} img/s  ETA {left}"


def _top1(row: dict) -> str:
    """The column of the top-1 that counts: the validation split's, where there is one."""
    return "val_top1" if "val_top1" in row else "test_top1"


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
