"""A model frozen for inference on a CPU.

An ordinary model may change between two calls: weights, hooks, the backend of a part. So it looks for all of that and
packs its weights anew every time, which for one image takes longer than computing it. A frozen model is a snapshot:
its blocks' weights are packed once, the position embedding is added to the tokens and to the patches' bias beforehand,
and two heads whose logits are averaged are one product. Other engines do the same when they load a model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.ops.checks import without_autocast
from deit_fast.ops.encoder import freeze_encoder

from .vit import PatchEmbed, VisionTransformer, are_alike


def freeze(model: VisionTransformer, dtype: torch.dtype | None = None) -> FrozenVisionTransformer:
    """The model's evaluation as a function of images alone: what `model(images)` gives, for one image faster.

    Args:
        model: on the CPU and in evaluation mode, without hooks or parts of one's own. It may be changed or thrown away
            afterwards: the frozen one keeps copies.
        dtype: of the blocks' activations, torch.float32 or torch.bfloat16; None: bfloat16 if the parameters are, else
            float32. What comes before and after the blocks is computed in float32.

    Raises TypeError or ValueError for a model that is none of these, BackendError where the C++ kernels cannot run.
    """
    if type(model) is not VisionTransformer:
        raise TypeError(f"freeze: model must be a VisionTransformer of deit_fast, got {type(model).__name__}.")
    if (reason := _obstacle(model)) is not None:
        raise ValueError(f"freeze: {reason}.")
    if dtype is None:
        dtype = torch.bfloat16 if model.cls_token.dtype == torch.bfloat16 else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"freeze: dtype must be torch.float32 or torch.bfloat16, got {dtype}.")
    return FrozenVisionTransformer(model, dtype)


class FrozenVisionTransformer:
    """What `freeze` returns. Safe to call from several threads."""

    def __init__(self, model: VisionTransformer, dtype: torch.dtype) -> None:
        embed, blocks, P = model.patch_embed, model.blocks, model.num_prefix_tokens
        self.dtype, self.eps, self.num_classes, self.num_prefix_tokens = dtype, model.eps, model.num_classes, P
        self.img_size, self.patch_size, self.grid_size = embed.img_size, embed.patch_size, embed.grid_size
        self.in_channels = embed.proj.in_channels
        tokens = [model.cls_token, model.dist_token] if model.two_heads else [model.cls_token]
        position = _copy(model.pos_embed)[0]  # (N, C)
        self.patch_weight = _copy(embed.proj.weight).flatten(1)  # (C, in_chans patch^2)
        self.prefix = torch.cat([_copy(token)[0] for token in tokens]) + position[:P]  # (P, C)
        self.patch_bias = position[P:] + _bias(embed.proj)  # (N - P, C)
        self.encoder = freeze_encoder([block.tensors() for block in blocks], blocks[0].attn.num_heads, blocks[0].eps,
                                      dtype)
        self.norm_weight, self.norm_bias = _copy(model.norm.weight), _copy(model.norm.bias)
        if self.num_classes:
            heads = [model.head, model.head_dist] if model.two_heads else [model.head]
            self.head_weight = torch.cat([_copy(head.weight) for head in heads], 1) / P  # (K, P C): the logits' mean
            self.head_bias = torch.stack([_bias(head) for head in heads]).mean(0)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) fp32 of images (B, in_chans, H, W); without classes the prefix tokens' mean (B, C)."""
        expected = (self.in_channels, self.img_size, self.img_size)
        if images.dim() != 4 or images.shape[1:] != expected or not images.is_floating_point() or not images.is_cpu:
            raise ValueError(f"images must be (B, {expected[0]}, {expected[1]}, {expected[2]}) floating point on the "
                             f"CPU, got {tuple(images.shape)} {images.dtype} on {images.device}.")
        with without_autocast(images):
            prefix = self.encoder(self._tokens(images))[:, :self.num_prefix_tokens].float()
            prefix = F.layer_norm(prefix, prefix.shape[-1:], self.norm_weight, self.norm_bias, self.eps)  # (B, P, C)
            if not self.num_classes:
                return prefix.mean(1)
            return F.linear(prefix.flatten(1), self.head_weight, self.head_bias)

    def _tokens(self, images: Tensor) -> Tensor:
        """What enters the first block: (B, in_chans, H, W) -> (B, N, C)."""
        (B, channels), P, g, p = images.shape[:2], self.num_prefix_tokens, self.grid_size, self.patch_size
        patches = images.float().reshape(B, channels, g, p, g, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(B, g * g, channels * p * p)
        x = images.new_empty((B, P + g * g, self.prefix.shape[1]), dtype=self.dtype)
        x[:, :P] = self.prefix
        torch.add(F.linear(patches, self.patch_weight), self.patch_bias, out=x[:, P:])
        return x


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone()


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return torch.zeros(layer.weight.shape[0]) if layer.bias is None else _copy(layer.bias)


def _obstacle(model: VisionTransformer) -> str | None:
    """Why the model's call is not what a frozen one would compute, or None."""
    heads = ("head", "head_dist")[:model.num_prefix_tokens] if model.num_classes else ()
    parts = {"patch_embed": (model.patch_embed, PatchEmbed), "patch_embed.proj": (model.patch_embed.proj, nn.Conv2d),
             "norm": (model.norm, nn.LayerNorm), **{name: (getattr(model, name), nn.Linear) for name in heads}}
    if model.training:
        return "the model is in training mode; call model.eval() first"
    if not model.blocks:
        return "the model has no blocks"
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        return f"the model is on {model.cls_token.device}; freeze a copy on the CPU"
    for name, (part, kind) in parts.items():
        if type(part) is not kind:
            return f"{name} is a {type(part).__name__}, not a {kind.__name__}: only the model's own parts can be frozen"
    hooked = any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
                 for module in (model, *(part for part, _ in parts.values())))
    if hooked or not are_alike(model.blocks):
        return "the model has hooks or changed blocks, which a frozen one would pass over; remove them"
    return None
