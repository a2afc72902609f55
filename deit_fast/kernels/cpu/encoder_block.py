"""C++ encoder block: forward is one call of the four kernels, backward the chain of their launchers.

Backward gets what the four ops save, and qkv, y and h, which autograd keeps for them otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoder_block import Arguments, Chain
from . import attention, launch, layernorm_linear, layernorm_mlp, linear_residual, module

# FLOP worth a thread here: it is still awake from one kernel when the next begins. With 4 M for each, as for a single
# op, one image of the report's size takes one thread, and 3.4 ms instead of 2.8 on two Zen 3 cores.
GRAIN = 1_500_000

_chain = Chain(layernorm_linear, attention, linear_residual, layernorm_mlp)
saved_like, backward = _chain.saved_like, _chain.backward


def threads(x: Tensor, features: int) -> int:
    """The threads for a block's forward on x (B, N, C) with so many hidden features."""
    B, N, C = x.shape
    return launch.threads(4 * B * N * C * (2 * C + N + features), GRAIN)


def why_not(*call: object) -> str | None:
    """Why this call cannot be served, or None."""
    a = Arguments(*call)
    return launch.why_not(a.x, a.fc1_weight.shape[0], max(a.dropout_p, a.attn_dropout_p), a.seed)


def forward(*call: object, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, N, C), [qkv, y, h, mean and rstd of LN1, lse, mean and rstd of LN2])."""
    a = Arguments(*call)
    saved = saved_like(*a) if save else []
    qkv, y, h, *statistics = map(launch.pointer, saved) if save else (0,) * 8
    tensors = launch.contiguous(*a[:13])
    x, (B, N, C), F = tensors[0], a.x.shape, a.fc1_weight.shape[0]
    seed = launch.seed_value(a.seed, max(a.dropout_p, a.attn_dropout_p))
    scales = [launch.row_factors(scale) for scale in (a.attn_row_scale, a.mlp_row_scale)]
    out = x.new_empty(x.shape)
    call = module.EncoderBlock(
        x.dtype == torch.bfloat16, B, N, C, a.num_heads, F, a.eps, launch.pointer(x),
        [launch.parameter(tensor) for tensor in tensors[1:]], a.dropout_p, a.attn_dropout_p,
        seed, *map(launch.pointer, scales), (*statistics, qkv, y, h), threads(x, F))
    launch.run(call, False, out.data_ptr())
    return out, saved
