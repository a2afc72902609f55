"""A model's metrics on a split, and `--eval`: those of a checkpoint on every split, without training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from deit_fast.data.datasets import ImageData
from deit_fast.errors import CheckpointError
from deit_fast.models import VisionTransformer
from deit_fast.training import checkpoint
from deit_fast.training.build import build_eval_loaders
from deit_fast.training.config import Config, RunConfig
from deit_fast.training.device import autocast
from deit_fast.training.metrics import METRICS, Evaluation
from deit_fast.training.progress import Log


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device,
            run: RunConfig) -> Evaluation:
    """The Evaluation of a model on batches of (images (B, 3, H, W), labels (B,)); its mode is afterwards as before."""
    evaluation = Evaluation(num_classes, device)
    training = model.training
    model.eval()
    with autocast(device, run):
        for images, labels in batches:
            evaluation.update(model(images), labels)
    model.train(training)
    return evaluation


def evaluate(config: Config, data: ImageData, model: VisionTransformer, resume: Path | None, device: torch.device,
             log: Log) -> None:
    """Logs the metrics of the model or, with `resume`, of a checkpoint's weights and of their average."""
    weights = {"": model.state_dict()}
    if resume is not None:
        state = checkpoint.load(resume, device)
        checkpoint.check_matches(resume, state, name=config.model.model, num_classes=len(data.classes))
        checkpoint.check_matches(resume, state["metadata"], tokens=model.tokens, img_size=model.patch_embed.img_size)
        if state["metadata"]["classes"] != list(data.classes):
            raise CheckpointError(f"{resume} knows the classes {', '.join(state['metadata']['classes'])}; "
                                  f"{data.name} has {', '.join(data.classes)}. Evaluate on the data that it was "
                                  "trained on.")
        log(f"weights from {resume}")
        weights = {"": state["model"]} | ({} if state["ema"] is None else {"ema_": state["ema"]["module"]})
    loaders = build_eval_loaders(config, data, device)
    for prefix, tensors in weights.items():
        model.load_state_dict(tensors)
        for split, loader in loaders.items():
            values = measure(model, loader, len(data.classes), device, config.run).compute()
            log(f"{prefix}{split}: {', '.join(f'{name} {values[name]:.4f}' for name in METRICS)}")
