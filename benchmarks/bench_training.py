"""A training step of the report's models: ours on the fast backends, ours on plain PyTorch, and timm's model.

All three start from the same weights and see the same batches of real digits, so beside the time of a step stand, in
`extra_info`, the training loss and the test top-1 after the same number of steps: a faster step that learns less shows.
Dropout is 0.1 as in the report where it is timed; each implementation draws its own masks, so losses agree within
noise, not bit for bit. DeiT's teacher is a fixed table of logits, since its cost is the same for everybody.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deit_fast import create_model, use_backend
from deit_fast.backend import record
from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import load_dataset
from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.ops import distillation_loss
from deit_fast.training.config import OptimConfig
from deit_fast.training.metrics import Evaluation
from deit_fast.training.optim import create_optimizer

STEPS, BATCH = 100, 64
DROP = 0.1


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("digits", val_split=0.0, log=lambda text: None)
    common = {"mean": data.mean, "std": data.std, "num_classes": 10}
    train = TrainLoader(data.train, Recipe(crop_pad=4), batch_size=BATCH, **common)
    batches = [batch for epoch in range(5) for batch in train.epoch(epoch)][:STEPS]
    return batches, EvalLoader(data.test, batch_size=256, **common)


def timm_model(ours: torch.nn.Module) -> torch.nn.Module:
    """timm's model of the same size and dropout, with our initial weights."""
    vit = pytest.importorskip("timm.models.vision_transformer", reason="timm is the peer: pip install -e '.[bench]'")
    deit = pytest.importorskip("timm.models.deit")
    cls = deit.VisionTransformerDistilled if ours.two_heads else vit.VisionTransformer
    model = cls(img_size=32, patch_size=4, embed_dim=64, depth=7, num_heads=8, num_classes=10, proj_drop_rate=DROP,
                pos_drop_rate=DROP)
    model.load_state_dict(ours.state_dict())
    if ours.two_heads:
        model.set_distilled_training(True)
    return model


@pytest.mark.parametrize("who", ["fused", "reference", "timm"])
@pytest.mark.parametrize("name", ["vit_nano_patch4_32", "deit_nano_distilled_patch4_32"])
def test_training_step(benchmark, digits, name: str, who: str) -> None:
    batches, test = digits
    torch.manual_seed(0)
    model = create_model(name, drop_rate=DROP)
    distilled = model.two_heads
    if who == "timm":
        model = timm_model(model)
    model.train()
    optimizer = create_optimizer(model, OptimConfig())
    losses: list[torch.Tensor] = []

    def call(images: torch.Tensor, step: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return model(images, torch.tensor(step)) if who == "fused" and seeded else model(images)

    def step() -> None:
        images, targets = batches[len(losses)]
        outputs = call(images, len(losses))
        if who == "timm":
            cls, dist = outputs if distilled else (outputs, None)
            loss = F.cross_entropy(cls, targets)
            if distilled:
                teacher = F.log_softmax(5 * targets / 3, dim=-1)
                soft = F.kl_div(F.log_softmax(dist / 3, -1), teacher, reduction="batchmean", log_target=True) * 9
                loss = (loss + soft) / 2
        elif distilled:
            loss = distillation_loss(*outputs, targets, 5 * targets, "soft", 0.5, 3.0)
        else:
            loss = distillation_loss(outputs, None, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    with use_backend(None if who == "fused" else "reference"):
        with record() as served, torch.no_grad():
            seeded = True
            call(batches[0][0], 0)
            seeded = all(served.get(op) != "reference" for op in ("linear_residual", "layernorm_mlp"))
        benchmark.group = f"training step, {name}, batch {BATCH}"
        benchmark.pedantic(step, rounds=STEPS)
        evaluation = Evaluation(10)
        model.eval()
        with torch.no_grad():
            for images, labels in test:
                evaluation.update(model(images), labels)
    images_per_second = BATCH / benchmark.stats.stats.median
    benchmark.extra_info.update(images_per_second=images_per_second, steps=STEPS, loss=torch.stack(losses[-8:]).mean().item(),
                                top1=evaluation.compute()["top1"], served=", ".join(sorted(set(served.values()))) if who == "fused" else who)
    assert torch.stack(losses[-8:]).mean() < torch.stack(losses[:8]).mean(), "the model did not learn"
