"""Attention alone at the presets' sizes: the native backends beside SDPA as `reference` calls it, eager and compiled.

Every row says in `extra_info` how far the output (and, with backward, the gradient) lies from fp64, and how far the eager
reference does: speed bought with accuracy shows here. Groups hold one size, dtype and direction, so the lines of a group are
each other's baselines. Dropout is compared with PyTorch's own generator in `reference` (its fastest), ours being seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deit_fast import backend as selection
from deit_fast import ops, reference
from needs import skip_or_fail
from oracle import errors


@dataclass(frozen=True)
class Size:
    name: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dropout_p: float = 0.0
    compiled: bool = True  # a compilation takes seconds, so a size that has no new code leaves it out


SIZES = (Size("nano_patch4_32", 64, 66, 8, 8), Size("nano_patch4_32_dropout", 16, 66, 8, 8, 0.1, compiled=False),
         Size("nano_patch4_32_one_image", 1, 66, 8, 8, compiled=False), Size("tiny_patch4_32", 16, 66, 3, 64, compiled=False),
         Size("small_patch4_32", 8, 66, 6, 64, compiled=False), Size("tiny_patch16_224", 4, 198, 3, 64, compiled=False))
PLAIN = ("reference", "compiled")
NATIVE = tuple(name for name in selection.BACKENDS
               if name != "reference" and selection.OPS["attention"].why_not_here(name) is None)


def cells() -> list:
    return [pytest.param(size, dtype, who, training,
                         id=f"{size.name}-{str(dtype).removeprefix('torch.')}-{'fwdbwd' if training else 'fwd'}-{who}")
            for size in SIZES for dtype in (torch.float32, torch.bfloat16) for training in (False, True) for who in (*NATIVE, *PLAIN)
            if size.compiled or who != "compiled"]


def results(call, qkv: Tensor, grad: Tensor, training: bool) -> list[Tensor]:
    """[out], or [out, dqkv]."""
    with torch.set_grad_enabled(training):
        out = call(qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)] if training else [out]


@pytest.mark.parametrize(("size", "dtype", "who", "training"), cells())
def test_attention(benchmark, size: Size, dtype: torch.dtype, who: str, training: bool) -> None:
    device = "cuda" if who != "cpu" and torch.cuda.is_available() else "cpu"
    B, N, H, C = size.batch, size.tokens, size.heads, size.heads * size.head_dim
    qkv = torch.randn(B, N, 3 * C).to(device, dtype).requires_grad_()
    grad = torch.randn(B, N, C).to(device, dtype)
    seed = torch.tensor(1, device=device)

    def native(x: Tensor, p: float = size.dropout_p) -> Tensor:
        return ops.attention(x, H, dropout_p=p, seed=seed, backend=who)

    def plain(x: Tensor, p: float = size.dropout_p) -> Tensor:
        return reference.attention(x, H, dropout_p=p)

    if who not in PLAIN:
        reason = selection.OPS["attention"].why_not(who, qkv, H, None, size.dropout_p, seed)
        if reason is not None:
            skip_or_fail(who, reason)
    call = plain if who == "reference" else torch.compile(plain, fullgraph=True) if who == "compiled" else native

    def work() -> None:
        results(call, qkv, grad, training)
        if device == "cuda":
            torch.cuda.synchronize()

    # Errors without dropout, whose masks differ between the generators.
    exact = results(lambda x: plain(x, 0.0), qkv.detach().double().requires_grad_(), grad.double(), training)
    baseline = results(lambda x: plain(x, 0.0), qkv, grad, training)
    ours = results(call if who == "compiled" else lambda x: call(x, 0.0), qkv, grad, training)
    for name, result, base, truth in zip(("out", "dqkv"), ours, baseline, exact):
        for whose, tensor in (("", result), ("reference_", base)):
            worst, rms = errors(tensor, truth)
            benchmark.extra_info.update({f"{name}_{whose}max_error": worst, f"{name}_{whose}rms_error": rms})
    benchmark.extra_info["images"] = B
    direction = "forward + backward" if training else "forward"
    benchmark.group = f"attention {size.name} {str(dtype).removeprefix('torch.')} {direction}"
    benchmark.pedantic(work, rounds=9, warmup_rounds=2)
