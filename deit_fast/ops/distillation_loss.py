"""DeiT's objective over both heads in one op: cross-entropy on the labels, distillation from the teacher.

As separate PyTorch calls it is a dozen kernels over (B, K) logits, which at CIFAR's size cost more launches than work; one
pass per row gives loss and both gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deit_fast import reference

from .checks import check, check_activation, check_device, without_autocast
from .registration import NativeOp

NATIVE = NativeOp(
    "distillation_loss", reference.distillation_loss, backends=("triton",),
    args="Tensor cls_logits, Tensor? dist_logits, Tensor target, Tensor? teacher_logits, str kind, float alpha, float tau, "
         "str reduction, float smoothing",
    grads=("cls_logits", "dist_logits"),
    out=lambda cls_logits, *_: cls_logits.new_empty((), dtype=torch.promote_types(cls_logits.dtype, torch.float32)))
OP = NATIVE.op

KINDS = ("none", "soft", "hard")
REDUCTIONS = ("batchmean", "numel")


def distillation_loss(cls_logits: Tensor, dist_logits: Tensor | None, target: Tensor, teacher_logits: Tensor | None = None,
                      kind: str = "none", alpha: float = 0.5, tau: float = 1.0, reduction: str = "batchmean",
                      smoothing: float = 0.0, *, backend: str | None = None) -> Tensor:
    """(1 - alpha) CE(cls, target) + alpha D(dist, teacher): logits (B, K) -> () fp32.

    Args:
        cls_logits, dist_logits: (B, K) of the class and the distillation head.
        target: (B,) int64 class indices, smoothed by `smoothing`, or (B, K) probabilities (mixed targets, which carry their
            own smoothing: `smoothing` > 0 is then a ValueError). Indices outside [0, K) raise on a CPU; on a GPU they are
            PyTorch's device-side assert.
        teacher_logits: (B, K); no gradient flows to it.
        kind: "none" (cross-entropy of the class head alone), "soft" (tau^2 KL(teacher / tau || dist / tau)) or "hard"
            (cross-entropy of the distillation head against the teacher's argmax, never smoothed).
        alpha: weight of the distillation term, in [0, 1]. tau: temperature, > 0.
        reduction: of the KL: "batchmean" (the paper's and the report's equation) or "numel" (DeiT's code, K times less).
        smoothing: label smoothing of int64 targets, in [0, 1).
        backend: who computes it; None: see `deit_fast.use_backend`.

    Raises ValueError or TypeError for arguments that do not fit, BackendError for a backend that cannot serve the call.
    Touvron et al. 2020, section 4.
    """
    _check(cls_logits, dist_logits, target, teacher_logits, kind, alpha, tau, reduction, smoothing)
    teacher_logits = None if teacher_logits is None else teacher_logits.detach()
    call = (cls_logits, dist_logits, target, teacher_logits, kind, alpha, tau, reduction, smoothing)
    with without_autocast(cls_logits):
        return NATIVE(backend, *call)


def _check(cls_logits: Tensor, dist_logits: Tensor | None, target: Tensor, teacher_logits: Tensor | None, kind: str,
           alpha: float, tau: float, reduction: str, smoothing: float) -> None:
    name = OP.name
    check(kind in KINDS, name, f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check(reduction in REDUCTIONS, name, f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check(0.0 <= alpha <= 1.0, name, f"alpha must be in [0, 1], got {alpha}")
    check(tau > 0.0, name, f"tau must be positive, got {tau}")
    check(0.0 <= smoothing < 1.0, name, f"smoothing must be in [0, 1), got {smoothing}")
    check_activation(name, "cls_logits", cls_logits)
    check(cls_logits.dim() == 2 and cls_logits.shape[1] > 0, name,
          f"cls_logits must have shape (B, K), got {tuple(cls_logits.shape)}")
    if not isinstance(target, Tensor) or not (target.dtype == torch.int64 or target.is_floating_point()):
        raise TypeError(f"{name}: target must be int64 (B,) or floating point (B, K), "
                        f"got {getattr(target, 'dtype', type(target).__name__)}.")
    soft = target.is_floating_point()
    expected = tuple(cls_logits.shape) if soft else (cls_logits.shape[0],)
    check(tuple(target.shape) == expected, name, f"target must have shape {expected}, got {tuple(target.shape)}")
    check_device(name, "target", target, cls_logits)
    check(not (soft and smoothing > 0.0), name,
          "smoothing must be 0 with soft targets, which carry their own (smoothing twice flattens them)")
    if kind == "none":
        return
    for argument, logits in (("dist_logits", dist_logits), ("teacher_logits", teacher_logits)):
        check(logits is not None, name, f"kind={kind!r} needs {argument}; use a distilled model and a teacher, or kind='none'")
        check_activation(name, argument, logits)
        check(logits.shape == cls_logits.shape, name,
              f"{argument} must have shape {tuple(cls_logits.shape)} like cls_logits, got {tuple(logits.shape)}")
        check_device(name, argument, logits, cls_logits)
