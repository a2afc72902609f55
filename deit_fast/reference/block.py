"""A transformer encoder block and its four ops, as their papers write them (Vaswani et al. 2017, Dosovitskiy et al. 2020).

B batch, N tokens, C width, H heads, D = C / H, F output features. Parameters may be fp32 beside bf16 or fp16 activations
(what autocast leaves an op with): the LayerNorm is then taken in fp32, the products in the activations' dtype.

Dropout: `seed=None` draws PyTorch's own (fast, and what every baseline uses); a seed draws the Philox mask that all
backends share (`philox.keep_mask`), whose site numbers are below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import keep_mask

SITE_ATTENTION, SITE_LINEAR_RESIDUAL, SITE_MLP_HIDDEN, SITE_MLP_OUTPUT = range(4)


def layernorm_linear(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
                     eps: float = 1e-6) -> Tensor:
    """LN(x) W^T + b: (..., C) -> (..., F)."""
    return linear(layer_norm(x, ln_weight, ln_bias, eps), weight, bias)


def attention(qkv: Tensor, num_heads: int, scale: float | None = None, dropout_p: float = 0.0,
              seed: Tensor | None = None) -> Tensor:
    """softmax(Q K^T scale) V of packed qkv: (B, N, 3C), laid out (3, H, D) -> (B, N, C)."""
    B, N, C3 = qkv.shape
    q, k, v = qkv.view(B, N, 3, num_heads, C3 // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
    if dropout_p == 0.0 or seed is None:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    else:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        p = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)  # (B, H, N, N)
        out = dropout(p, dropout_p, seed, SITE_ATTENTION) @ v
    return out.transpose(1, 2).reshape(B, N, C3 // 3)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout_p: float = 0.0,
                    seed: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    """residual + row_scale * dropout(x W^T + b): (B, ..., C), residual (B, ..., F) -> (B, ..., F)."""
    y = dropout(linear(x, weight, bias), dropout_p, seed, SITE_LINEAR_RESIDUAL)
    return residual + scale_rows(y, row_scale)


def layernorm_mlp(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor | None,
                  fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float = 1e-6, dropout_p: float = 0.0,
                  seed: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    """x + row_scale * dropout(W2 dropout(gelu(W1 LN(x)))): (B, ..., C) -> (B, ..., C), exact (erf) GELU."""
    hidden = F.gelu(linear(layer_norm(x, ln_weight, ln_bias, eps), fc1_weight, fc1_bias))  # (B, ..., F)
    hidden = dropout(hidden, dropout_p, seed, SITE_MLP_HIDDEN)
    y = dropout(linear(hidden, fc2_weight, fc2_bias), dropout_p, seed, SITE_MLP_OUTPUT)
    return x + scale_rows(y, row_scale)


def encoder_block(x: Tensor, ln1_weight: Tensor, ln1_bias: Tensor | None, qkv_weight: Tensor, qkv_bias: Tensor | None,
                  proj_weight: Tensor, proj_bias: Tensor | None, ln2_weight: Tensor, ln2_bias: Tensor | None,
                  fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
                  num_heads: int, eps: float = 1e-6, dropout_p: float = 0.0, attn_dropout_p: float = 0.0,
                  seed: Tensor | None = None, attn_row_scale: Tensor | None = None,
                  mlp_row_scale: Tensor | None = None) -> Tensor:
    """Both halves of a pre-norm block, attention and MLP, each added to its input: (B, N, C) -> (B, N, C)."""
    qkv = layernorm_linear(x, ln1_weight, ln1_bias, qkv_weight, qkv_bias, eps)
    y = attention(qkv, num_heads, None, attn_dropout_p, seed)
    h = linear_residual(y, proj_weight, proj_bias, x, dropout_p, seed, attn_row_scale)
    return layernorm_mlp(h, ln2_weight, ln2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, dropout_p, seed,
                         mlp_row_scale)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in fp32 where a parameter is wider than x: (..., C) -> (..., C)."""
    wide = weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)
    y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps)
    return y.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the dtype of x: (..., C) -> (..., F)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def dropout(x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """x with elements zeroed with probability p and the rest scaled by 1 / (1 - p)."""
    if p == 0.0:
        return x
    if seed is None:
        return F.dropout(x, p)
    return torch.where(keep_mask(x.shape, p, seed, site), x * (1.0 / (1.0 - p)), 0.0)


def scale_rows(y: Tensor, row_scale: Tensor | None) -> Tensor:
    """Each sample of y (B, ...) times its row_scale (B,): drop-path."""
    if row_scale is None:
        return y
    return y * row_scale.to(y.dtype).view(-1, *(1,) * (y.dim() - 1))
