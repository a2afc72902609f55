"""A trained model looked into on the test set: probabilities, the two tokens after every layer, each head alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deit_fast import create_model, ops, use_backend
from deit_fast.data.datasets import ImageData
from deit_fast.models import VisionTransformer
from deit_fast.training import checkpoint
from deit_fast.training.build import build_eval_loaders
from deit_fast.training.device import autocast, resolve_device
from deit_fast.training.study.results import Result

BINS = 15


@dataclass(frozen=True)
class Inspection:
    """heads: top-1 of "class", "second" and "mean of both" (one head: of "class" only). cosines: one per layer, the
    first of the input, or none with one token. calibration: see `calibrate`."""

    heads: dict[str, float]
    cosines: list[float]
    calibration: dict


def load(result: Result, data: ImageData) -> VisionTransformer:
    """The model of a run, with the weights of its best epoch, in evaluation mode on the run's device."""
    c = result.summary["model"]
    model = create_model(c["name"], len(data.classes), tokens=c["tokens"], img_size=data.train.images.shape[-1])
    model.load_state_dict(checkpoint.load_weights(result.run.folder / "model.safetensors"))
    return model.eval().to(resolve_device(result.run.config.run.device))


def forward_flops(model: VisionTransformer) -> int:
    """Floating-point operations of one image's forward pass; a multiplication and its addition are two."""
    device, size = model.cls_token.device, model.patch_embed.img_size
    # As plain products: the counter does not know the fused attention of a CPU (torch 2.14), and would leave it out.
    plain = sdpa_kernel(SDPBackend.MATH)
    with use_backend("reference"), plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=device))
    return counter.get_total_flops()


@torch.no_grad()
def inspect(result: Result, data: ImageData) -> Inspection:
    """The Inspection of a run's best epoch on the test set."""
    model, config = load(result, data), result.run.config
    device = model.cls_token.device
    logits, labels, cosines = [], [], []
    with (
        use_backend(None if config.run.fused else "reference"),
        autocast(device, config.run),
        _inputs_of_blocks(model) as layers,
    ):
        for images, truth in build_eval_loaders(config, data, device)["test"]:
            layers.clear()
            tokens = model.encode(images)  # (B, N, C)
            prefix = [*layers, tokens[:, : model.num_prefix_tokens]]  # depth + 1 times (B, P, C)
            if model.two_heads:
                cosines.append(
                    torch.stack([F.cosine_similarity(x[:, 0].float(), x[:, 1].float(), dim=-1) for x in prefix], 1)
                )
            logits.append(_heads(model, tokens).float())
            labels.append(truth)
    logits, labels = torch.cat(logits), torch.cat(labels)  # (N, heads, K), (N,)
    alone = {name: _top1(logits[:, index], labels) for index, name in zip(range(logits.shape[1]), ("class", "second"))}
    mean = logits.mean(dim=1)
    heads = alone | ({"mean of both": _top1(mean, labels)} if model.two_heads else {})
    return Inspection(
        heads, torch.cat(cosines).mean(dim=0).tolist() if cosines else [], calibrate(mean.softmax(dim=-1), labels)
    )


def calibrate(probabilities: Tensor, labels: Tensor) -> dict:
    """{"confidence", "accuracy", "count"}: per bin of equal width, and "ece": their mean distance, weighted by count.

    probabilities: (N, K). labels: (N,). Guo et al. 2017.
    """
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == labels).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(bins, minlength=BINS)
    sums = [torch.bincount(bins, weights=values.double(), minlength=BINS) for values in (confidence, right)]
    means = [values / count.clamp(min=1) for values in sums]
    ece = ((means[0] - means[1]).abs() * count).sum() / count.sum()
    return {"confidence": means[0].tolist(), "accuracy": means[1].tolist(), "count": count.tolist(), "ece": ece.item()}


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: Tensor) -> Tensor:
    """What the prefix tokens look at in the last block, mean over heads: (B, 3, H, W) -> (B, P, g, g).

    g patches a side; the attention to patches only, so a map does not sum to 1.
    """
    captured = []
    handle = model.blocks[-1].register_forward_pre_hook(lambda _, arguments: captured.append(arguments[0]))
    model.encode(images)
    handle.remove()
    block, (x,) = model.blocks[-1], captured  # (B, N, C)
    B, N, C = x.shape
    H, P = block.attn.num_heads, model.num_prefix_tokens
    qkv = ops.layernorm_linear(
        x, block.norm1.weight, block.norm1.bias, block.attn.qkv.weight, block.attn.qkv.bias, block.eps
    )
    q, k, _ = qkv.view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
    weights = (q[:, :, :P] @ k.transpose(-2, -1) * (C // H) ** -0.5).softmax(dim=-1).mean(dim=1)  # (B, P, N)
    g = model.patch_embed.grid_size
    return weights[:, :, P:].reshape(B, P, g, g)


@contextmanager
def _inputs_of_blocks(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """Yields a list that collects the prefix tokens (B, P, C) that every block is given."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][:, : model.num_prefix_tokens]))
        for block in model.blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _heads(model: VisionTransformer, tokens: Tensor) -> Tensor:
    """(B, heads, K) logits of each head, from the tokens (B, N, C) behind the last block."""
    x = model.norm(tokens[:, : model.num_prefix_tokens])
    heads = (model.head, model.head_dist) if model.two_heads else (model.head,)
    return torch.stack([head(x[:, index]) for index, head in enumerate(heads)], dim=1)


def _top1(logits: Tensor, labels: Tensor) -> float:
    """The share of logits (N, K) whose largest is the label's (N,)."""
    return (logits.argmax(dim=-1) == labels).double().mean().item()
