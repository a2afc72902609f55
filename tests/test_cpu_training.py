"""Training with the C++ kernels against training with the reference: the same start, batches and dropout masks.

Two trainings that differ by roundings part for good after some dozen steps: Adam divides small gradients by their own
noise and so amplifies it. Hence the first steps are held against a third training in fp64, by the oracle, and the end
against what other dropout masks would have changed.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from deit_fast import create_model, ops, use_backend
from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import load_dataset
from deit_fast.data.loader import TrainLoader
from deit_fast.training.config import OptimConfig
from deit_fast.training.optim import create_optimizer
from needs import needs_cpu
from oracle import assert_within_budget

pytestmark = needs_cpu


def batches_of(size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first batches of digits: images (size, 3, 32, 32) and targets (size, 10)."""
    data = load_dataset("digits", val_split=0.0, log=lambda text: None)
    loader = TrainLoader(data.train, Recipe(), batch_size=size, mean=data.mean, std=data.std, num_classes=10)
    epochs = -(-count // len(loader))
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)][:count]


class Training:
    """The report's ViT with Adam at 1e-3 and seeded dropout 0.1, from one seed; `masks` numbers the first masks."""

    def __init__(self, backend: str, depth: int, dtype: torch.dtype = torch.float32, masks: int = 0) -> None:
        torch.manual_seed(0)
        self.model = create_model("vit_nano_patch4_32", depth=depth, dtype=dtype).train()
        self.model.pos_drop.p = 0.0  # PyTorch's own dropout, whose mask has no seed
        self.optimizer = create_optimizer(self.model, OptimConfig())
        self.backend, self.dtype, self.masks = backend, dtype, masks

    def step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
        """(logits (B, 10), gradient of all parameters (P,), loss)."""
        self.optimizer.zero_grad(set_to_none=True)
        with use_backend(self.backend, distillation_loss="reference"):
            logits = self.model(images.to(self.dtype), torch.tensor(self.masks))
            loss = ops.distillation_loss(logits, None, targets.to(self.dtype))
        loss.backward()
        self.optimizer.step()
        self.masks += 1
        grads = torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])
        return logits.detach(), grads, loss.item()


def assert_first_steps(batches: list[tuple[Tensor, Tensor]], depth: int) -> tuple[Training, Training]:
    """The `cpu` and the `reference` training after these steps, at each of which the oracle accepted `cpu`'s."""
    native, baseline = Training("cpu", depth), Training("reference", depth)
    truth = Training("reference", depth, torch.float64)
    for number, batch in enumerate(batches):
        results = [training.step(*batch) for training in (native, truth, baseline)]
        for what, *triple in zip(("logits", "gradient"), *(result[:2] for result in results)):
            assert_within_budget(f"step {number}: {what}", *triple)
    return native, baseline


def test_the_first_steps_stay_within_the_budget() -> None:
    assert_first_steps(batches_of(4, 5), depth=2)


@pytest.mark.slow
def test_200_steps_end_at_the_reference_s_loss() -> None:
    """The mean loss of the last 20 steps, against its spread over other dropout masks; and it has fallen."""
    depth, steps, first = 7, 200, 12
    batches = batches_of(32, steps)
    native, baseline = assert_first_steps(batches[:first], depth)

    def end(training: Training, todo: list[tuple[Tensor, Tensor]]) -> float:
        return statistics.mean([training.step(*batch)[2] for batch in todo][-20:])

    ours, theirs = end(native, batches[first:]), end(baseline, batches[first:])
    others = [end(Training("cpu", depth, masks=1000 * run), batches) for run in range(1, 6)]
    noise = statistics.stdev([ours, *others])
    print(f"last 20 losses: cpu {ours:.4f}, reference {theirs:.4f}, cpu with other masks "
          f"{', '.join(f'{other:.4f}' for other in others)}: standard deviation {noise:.4f}")
    assert abs(ours - theirs) <= 3 * noise
    assert max(ours, theirs) < 2.0, "the model did not learn: it starts at ln 10 = 2.3"
