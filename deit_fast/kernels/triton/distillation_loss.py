"""The distillation objective in one pass over the logits: a program reads its rows of both heads, the labels and the
teacher once, and leaves its part of the loss and both unit gradients.

Gradients are kept in fp32 whatever the logits' dtype: 1 / B times a small probability is subnormal in fp16, and the
loss scale that would save it comes only with backward's factor. For the batches of small images one program holds all
rows and the loss is done; larger ones take a second launch that adds the parts up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, contiguous, launch, power_of_two, refusal

OP = "distillation_loss"
ELEMENTS = 4096  # logits of a program's tile
MAX_CLASSES = 16384  # a row is held in registers


@triton.jit
def _log_softmax(x, inside):
    """log softmax (BM, BLOCK) over the columns inside; 0 outside."""
    x = tl.where(inside, x, float("-inf"))
    x = x - tl.max(x, 1)[:, None]
    x = x - tl.log(tl.sum(tl.exp(x), 1))[:, None]
    return tl.where(inside, x, 0.0)


@triton.jit
def _rows(ptr, rows, cols, inside, K: tl.constexpr):
    """A tile (BM, BLOCK) of logits in fp32."""
    return tl.load(ptr + rows[:, None] * K + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B"])
def distillation_loss_kernel(cls_ptr, dist_ptr, target_ptr, teacher_ptr, loss_ptr, dcls_ptr, ddist_ptr, B, alpha, tau,
                             smoothing, kl_scale, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                             KIND: tl.constexpr, SOFT_TARGET: tl.constexpr):
    """loss[pid]: this program's share of the mean; dcls, ddist (B, K) fp32: gradients for a loss gradient of 1."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    inside = (cols < K)[None, :] & (rows < B)[:, None]
    where = rows[:, None] * K + cols[None, :]
    if SOFT_TARGET:
        target = _rows(target_ptr, rows, cols, inside, K)
    else:
        label = tl.load(target_ptr + rows, mask=rows < B, other=0)
        label = tl.minimum(tl.maximum(label, 0), K - 1)  # values are not checked on a GPU, reads stay inside
        target = tl.where(cols[None, :] == label[:, None], 1.0 - smoothing, 0.0) + smoothing / K
        target = tl.where(inside, target, 0.0)
    weight = (1.0 if KIND == "none" else 1.0 - alpha) / B
    log_p = _log_softmax(_rows(cls_ptr, rows, cols, inside, K), (cols < K)[None, :])
    loss = -weight * tl.sum(tl.where(target != 0.0, target * log_p, 0.0), 1)  # (BM,); a class at -inf costs nothing
    if dcls_ptr is not None:
        tl.store(dcls_ptr + where, weight * (tl.exp(log_p) * tl.sum(target, 1)[:, None] - target), mask=inside)
    if KIND == "soft":
        log_p = _log_softmax(_rows(dist_ptr, rows, cols, inside, K) / tau, (cols < K)[None, :])
        log_q = _log_softmax(_rows(teacher_ptr, rows, cols, inside, K) / tau, (cols < K)[None, :])
        q = tl.exp(log_q)
        loss += alpha * kl_scale * tl.sum(tl.where(inside, q * (log_q - log_p), 0.0), 1)
        if ddist_ptr is not None:
            tl.store(ddist_ptr + where, alpha * kl_scale / tau * (tl.exp(log_p) - q), mask=inside)
    elif KIND == "hard":
        log_p = _log_softmax(_rows(dist_ptr, rows, cols, inside, K), (cols < K)[None, :])
        teacher = tl.where((cols < K)[None, :], _rows(teacher_ptr, rows, cols, inside, K), float("-inf"))
        chosen = tl.where((cols[None, :] == tl.argmax(teacher, 1)[:, None]) & inside, 1.0, 0.0)
        loss -= alpha / B * tl.sum(tl.where(chosen != 0.0, log_p, 0.0), 1)
        if ddist_ptr is not None:
            tl.store(ddist_ptr + where, alpha / B * (tl.exp(log_p) - chosen), mask=inside)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(rows < B, loss, 0.0), 0))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(part_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out () = the sum of part (count,); one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit(do_not_specialize=["size"])
def scale_kernel(unit_ptr, grad_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out (size,) = unit * grad, grad ()."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(unit_ptr + i, mask=i < size, other=0.0) * tl.load(grad_ptr).to(tl.float32)
    tl.store(out_ptr + i, value.to(out_ptr.dtype.element_ty), mask=i < size)


def why_not(cls_logits: Tensor, dist_logits: Tensor | None, target: Tensor, teacher_logits: Tensor | None, kind: str,
            alpha: float, tau: float, reduction: str, smoothing: float) -> str | None:
    """Why this call cannot be served, or None."""
    if cls_logits.shape[1] > MAX_CLASSES:
        return f"{cls_logits.shape[1]} classes are more than {MAX_CLASSES}"
    if cls_logits.shape[0] == 0:
        return "there are no rows, whose mean is not a number"
    soft = target if target.is_floating_point() else None
    for tensor in (cls_logits, *((dist_logits, teacher_logits) if kind != "none" else ()), soft):
        reason = None if tensor is None else refusal(OP, tensor)
        if reason is not None:
            return reason
    return None


def saved_like(cls_logits: Tensor, dist_logits: Tensor | None, target: Tensor, teacher_logits: Tensor | None, kind: str,
               *_: object) -> list[Tensor]:
    """What forward saves, uninitialised: unit gradients (B, K) fp32 of the heads that have one."""
    return [cls_logits.new_empty(cls_logits.shape, dtype=torch.float32) for _ in range(1 if kind == "none" else 2)]


def forward(cls_logits: Tensor, dist_logits: Tensor | None, target: Tensor, teacher_logits: Tensor | None, kind: str,
            alpha: float, tau: float, reduction: str, smoothing: float, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(loss () fp32, unit gradients) of logits (B, K)."""
    if kind == "none":
        dist_logits = teacher_logits = None
    cls_logits, dist_logits, target, teacher_logits = contiguous(cls_logits, dist_logits, target, teacher_logits)
    B, K = cls_logits.shape
    saved = saved_like(cls_logits, dist_logits, target, teacher_logits, kind) if save else []
    BLOCK_K = power_of_two(K)
    BLOCK_M = min(power_of_two(B, 1), max(1, ELEMENTS // BLOCK_K))
    programs = cdiv(B, BLOCK_M)
    loss = cls_logits.new_empty((), dtype=torch.float32)
    parts = loss if programs == 1 else loss.new_empty(programs)
    launch(OP, distillation_loss_kernel, programs, cls_logits, cls_ptr=cls_logits, dist_ptr=dist_logits,
           target_ptr=target, teacher_ptr=teacher_logits, loss_ptr=parts, dcls_ptr=saved[0] if save else None,
           ddist_ptr=saved[1] if save and kind != "none" else None, B=B, alpha=float(alpha), tau=float(tau),
           smoothing=float(smoothing), kl_scale=float(tau) ** 2 / (B if reduction == "batchmean" else B * K), K=K,
           BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, KIND=kind, SOFT_TARGET=target.is_floating_point(),
           num_warps=4 if BLOCK_M * BLOCK_K <= 2048 else 8)  # 32 elements a thread spill
    if programs > 1:
        launch(OP, sum_kernel, 1, cls_logits, part_ptr=parts, out_ptr=loss, count=programs, BLOCK=256, num_warps=4)
    return loss, saved


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], cls_logits: Tensor, dist_logits: Tensor | None,
             *_: object) -> list[Tensor]:
    """[dcls (B, K), ddist (B, K)] of grad ()."""
    grads = []
    for i, logits in enumerate((cls_logits, dist_logits)):
        if not needs[i] or logits is None:
            grads.append(cls_logits.new_empty(0))
        elif i < len(saved):
            grads.append(logits.new_empty(logits.shape))
            launch(OP, scale_kernel, cdiv(logits.numel(), 1024), logits, unit_ptr=saved[i], grad_ptr=grad,
                   out_ptr=grads[i], size=logits.numel(), BLOCK=1024, num_warps=4)
        else:
            grads.append(logits.new_zeros(logits.shape))
    return grads
