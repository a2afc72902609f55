"""What a batch does to a model: forward, loss, backward and, once enough gradients are gathered, the optimizer's step.

Steps come in two kinds that compute the same: `EagerSteps`, as PyTorch runs any program, and `GraphedSteps`
(graphs.py), which records the launches of a step once and replays them. So what a `Learner` does is a function of
tensors alone, and its state (weights, moments, averages, sums) consists of tensors that stay where they are.

Nothing here waits for the device. The loss is summed there, and the first batch whose loss is not finite is noted
there. (fp16 is the exception: its loss scaler looks at the gradients in every step.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deit_fast.training.config import OptimConfig, RunConfig
from deit_fast.training.device import autocast
from deit_fast.training.job import Job
from deit_fast.training.optim import Schedule, create_optimizer, set_lr


class Learner:
    """A job's model with its optimizer: `learn` from a batch, `update` with the gradients of the last `accumulate`.

    Batches are numbered over the whole run, from 0: the number seeds the batch's dropout, and no two share one.
    """

    def __init__(self, job: Job, optim: OptimConfig, run: RunConfig, device: torch.device) -> None:
        self.job, self.run, self.device = job, run, device
        self.accumulate, self.clip_grad = optim.grad_accum_steps, optim.clip_grad
        self.optimizer = create_optimizer(job.model, optim)
        self.forward = torch.compile(job.model) if run.torchcompile else job.model
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp and run.amp_dtype == "float16")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)  # number of a batch, -1: none

    def learn(self, number: int | Tensor, images: Tensor, targets: Tensor, *teacher_logits: Tensor) -> None:
        """Adds the gradients of batch `number`: images (B, 3, H, W), targets (B, K), stored teacher_logits (B, K)."""
        seed = () if self.job.seed is None else (self.job.seed + number,)
        with autocast(self.device, self.run):
            loss = self.job.objective(images, self.forward(images, *seed), targets, *teacher_logits)
        self.scaler.scale(loss / self.accumulate).backward()
        loss = loss.detach()
        self.loss_sum += loss
        bad = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad.copy_(torch.where(bad, number, self.first_bad))

    def update(self, lr: float | Tensor) -> None:
        """The optimizer's step at a learning rate, a number or () on the device, and the average's."""
        set_lr(self.optimizer, lr)
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.job.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Gradients that are added to must stay where they are; others are given back before the average needs memory.
        self.optimizer.zero_grad(set_to_none=self.accumulate == 1)
        if self.job.ema is not None:
            self.job.ema.update(self.job.model)


class EagerSteps:
    """The steps of an epoch, one after the other, each launched anew."""

    def __init__(self, learner: Learner, schedule: Schedule) -> None:
        self.learner, self.schedule = learner, schedule

    def epoch(self, epoch: int, start: int) -> Iterator[None]:
        """Trains on one batch of the epoch per iteration, from batch `start` on."""
        learner, accumulate = self.learner, self.learner.accumulate
        steps = self.schedule.steps_per_epoch * accumulate
        for step, batch in zip(range(start, steps), self._batches(epoch, start)):
            number = epoch * steps + step
            learner.learn(number, *batch)
            if (step + 1) % accumulate == 0:
                learner.update(self.schedule.lr(number // accumulate))
            yield

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """The rest of an epoch: (images, targets), and the teacher's logits where they are stored."""
        job = self.learner.job
        with job.recipe_of(epoch):
            batches = job.train.epoch(epoch, start)
            if job.teacher_logits is None:
                return batches
            logits = job.teacher_logits(epoch).split(job.train.batch_size)  # each (B, K)
        return ((*batch, of_teacher) for batch, of_teacher in zip(batches, logits[start:], strict=True))
