"""Loading somebody's weights into a model of another shape: other class count, image size or token set.

What DeiT's and timm's fine-tuning do, with their traps closed: *both* heads are replaced when the class count differs,
the position embedding's prefix rows are split off before its grid is resized (bicubic, in fp32, with antialiasing as
timm; skipped when the size is equal), and a checkpoint without a distillation token keeps the model's fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .vit import VisionTransformer

CONTAINERS = ("model", "state_dict")  # the keys of the weights in DeiT's checkpoints (and ours), and in timm's
SECOND_TOKEN = ("dist_token", "head_dist.weight", "head_dist.bias")


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of torch.compile (`_orig_mod.`) and DDP (a leading `module.`)."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def plain_weights(checkpoint: Mapping) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under one of CONTAINERS or the checkpoint itself, with clean names."""
    weights = next((checkpoint[key] for key in CONTAINERS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    return {clean_name(str(name)): tensor for name, tensor in weights.items()}


def resize_pos_embed(pos_embed: Tensor, num_prefix_tokens: int, grid_size: int) -> Tensor:
    """The embedding with its grid resized: (1, P + g^2, C) -> (1, P + grid_size^2, C), P = num_prefix_tokens."""
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    old = math.isqrt(grid.shape[1])
    if old * old != grid.shape[1]:
        raise ValueError(f"pos_embed has {grid.shape[1]} patch rows behind {num_prefix_tokens} prefix rows, which is "
                         "no square grid.")
    if old == grid_size:
        return pos_embed
    image = grid.float().view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, C, g, g)
    image = F.interpolate(image, (grid_size, grid_size), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(grid.dtype)], dim=1)


def load_weights(model: VisionTransformer, checkpoint: Mapping) -> list[str]:
    """Notes on what was adapted, after loading the checkpoint's weights into the model.

    checkpoint: a state dict, or a dict that holds one under "model" or "state_dict". Raises ValueError when it is of
    another architecture, naming the first tensors that do not fit.
    """
    weights = plain_weights(checkpoint)
    own, notes = model.state_dict(), []
    if "pos_embed" in weights:
        weights["pos_embed"] = _fit_pos_embed(weights, model, notes)
    if not model.two_heads:
        dropped = [name for name in SECOND_TOKEN if weights.pop(name, None) is not None]
        if dropped:
            notes.append("the checkpoint's distillation token and head are left out")
    elif "dist_token" not in weights:
        weights.update({name: own[name] for name in SECOND_TOKEN if name in own})
        notes.append("the checkpoint has no distillation token: token and head start fresh")
    if "head.weight" in weights and "head.weight" in own and weights["head.weight"].shape != own["head.weight"].shape:
        heads = [name for name in own if name.startswith("head")]
        notes.append(f"{weights['head.weight'].shape[0]} classes in the checkpoint, {own['head.weight'].shape[0]} in "
                     "the model: every head starts fresh")
        weights.update({name: own[name] for name in heads})
    wrong = [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in own
             if name in weights and weights[name].shape != own[name].shape]
    wrong += [f"{name} missing" for name in own if name not in weights]
    wrong += [f"{name} unknown" for name in weights if name not in own]
    if wrong:
        raise ValueError(f"the checkpoint is of another model: {'; '.join(wrong[:4])}"
                         f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}.")
    model.load_state_dict(weights)
    return notes


def _fit_pos_embed(weights: Mapping[str, Tensor], model: VisionTransformer, notes: list[str]) -> Tensor:
    pos_embed, own = weights["pos_embed"], model.pos_embed.detach()
    old_prefix, new_prefix = 1 + ("dist_token" in weights), model.num_prefix_tokens
    if pos_embed.dim() != 3 or pos_embed.shape[-1] != own.shape[-1]:
        return pos_embed
    size = model.patch_embed.grid_size
    resized = resize_pos_embed(pos_embed, old_prefix, size)
    if resized.shape[1] != pos_embed.shape[1]:
        notes.append(f"position embedding resized to a grid of {size} x {size}")
    prefix = own[:, :new_prefix].clone()
    shared = min(old_prefix, new_prefix)
    prefix[:, :shared] = resized[:, :shared]
    return torch.cat([prefix.to(resized.dtype), resized[:, old_prefix:].to(prefix.device)], dim=1)
