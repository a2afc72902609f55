"""What a Trainer is given: a model, its data and objective, and where the run is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.training.optim import ModelEma


@dataclass
class Job:
    """What a Trainer trains and where it writes.

    settings: what makes the run what it is, as plain values; a checkpoint with other settings is refused.
    metadata: plain values that go into the weights' files.
    seed: key of the first batch's dropout masks when the fused ops draw them, None for PyTorch's own dropout.
    mixing_off: the epoch, counted from 0, from which MixUp and CutMix are off; 0: never.
    title: what the progress lines begin with.
    teacher_logits: epoch -> the logits (N, K) of its images in the order of its plan, handed to the objective batch by
        batch; None: it asks its teacher itself.
    remedy: what to do when the loss is not finite.
    """

    name: str
    model: nn.Module
    objective: Callable[..., Tensor]  # (images, outputs, targets[, teacher_logits]) -> ()
    train: TrainLoader
    splits: dict[str, EvalLoader]
    num_classes: int
    output_dir: Path
    settings: dict
    metadata: dict = field(default_factory=dict)
    seed: Tensor | None = None
    ema: ModelEma | None = None
    mixing_off: int = 0
    title: str = ""
    teacher_logits: Callable[[int], Tensor] | None = None
    remedy: str = "Lower --lr, or limit gradients with --clip-grad 1.0."

    @contextmanager
    def recipe_of(self, epoch: int) -> Iterator[None]:
        """Inside, the loader draws by the recipe of this epoch, with or without mixing; afterwards it is as before."""
        recipe = self.train.recipe
        self.train.recipe = recipe.at(epoch, self.mixing_off)
        try:
            yield
        finally:
            self.train.recipe = recipe
