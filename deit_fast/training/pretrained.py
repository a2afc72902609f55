"""torchvision's ImageNet weights: from torch's cache, or downloaded with an end to every wait."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from deit_fast.data.cifar import PROBE_SECONDS, STALL_SECONDS, socket_timeout, unreachable
from deit_fast.errors import DataError


def pretrained_weights(name: str) -> Mapping[str, Tensor]:
    """The state dict of torchvision's DEFAULT weights of network `name`; DataError when they cannot be had."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    remedy = (f"Put that file into {cached.parent}, or use --teacher-weights none (train from scratch) or "
              "--teacher-path.")
    why = None if cached.exists() else unreachable(weights.url, PROBE_SECONDS)
    if why is not None:
        raise DataError(f"--teacher-weights DEFAULT: {weights.url} cannot be downloaded ({why}). {remedy}")
    try:
        with socket_timeout(STALL_SECONDS):
            return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"--teacher-weights DEFAULT: {weights.url} could not be loaded ({error}). {remedy}") from error
