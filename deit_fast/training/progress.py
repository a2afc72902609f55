"""What a user sees of a running training: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Log:
    """Prints lines, above the live bar where there is one: `log("text")`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)

    def __call__(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Epoch, loss, top-1, images per second and time left of a run; a context manager."""

    def __init__(self, epochs: int, steps_per_epoch: int, batch_size: int, log: Log) -> None:
        self.epochs, self.steps, self.batch_size, self.log = epochs, steps_per_epoch, batch_size, log
        self.bar = None
        if log.console.is_terminal:
            self.bar = Bar(TextColumn("epoch {task.fields[epoch]}"), BarColumn(None), MofNCompleteColumn(),
                           TextColumn("{task.fields[words]}"), TimeElapsedColumn(), console=log.console)
            self.task = self.bar.add_task("", total=steps_per_epoch, epoch=f"1/{epochs}", words="")
        self.epoch = 0
        self.top1: float | None = None
        self.mark = (time.perf_counter(), 0)  # (moment, step) of the last report
        self.rate = 0.0

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
            self.bar.reset(self.task, total=self.steps, completed=step, epoch=f"{epoch + 1}/{self.epochs}", words="")

    def advance(self, step: int, loss: float) -> None:
        """`step` batches of the epoch are done, with this mean loss."""
        now, (moment, before) = time.perf_counter(), self.mark
        self.mark = (now, step)
        if step > before:
            self.rate = (step - before) * self.batch_size / (now - moment)
        left = (self.epochs - self.epoch - 1) * self.steps + self.steps - step
        top1 = "" if self.top1 is None else f"  top-1 {self.top1:.3f}"
        words = (f"loss {loss:.4f}{top1}  {self.rate:,.0f} img/s  "
                 f"ETA {_duration(left * self.batch_size / max(self.rate, 1e-9))}")
        if self.bar:
            self.bar.update(self.task, completed=step, words=words)
        else:
            self.log(f"epoch {self.epoch + 1}/{self.epochs}  step {step}/{self.steps}  {words}")

    def epoch_done(self, row: dict) -> None:
        """An epoch's row of metrics."""
        split = "val" if "val_top1" in row else "test"
        self.top1 = row[f"{split}_top1"]
        line = (f"epoch {row['epoch']}/{self.epochs} done: train loss {row['train_loss']:.4f}, {split} loss "
                f"{row[f'{split}_loss']:.4f}, top-1 {self.top1:.4f}, top-5 {row[f'{split}_top5']:.4f}, AUC "
                f"{row[f'{split}_auc']:.4f}, F1 {row[f'{split}_f1']:.4f}")
        if f"ema_{split}_top1" in row:
            line += f", EMA top-1 {row[f'ema_{split}_top1']:.4f}"
        self.log(f"{line}  ({row['images_per_second']:,.0f} img/s, {_duration(row['seconds'])})")


def _duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
