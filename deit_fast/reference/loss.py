"""The distillation objective of DeiT (Touvron et al. 2020, section 4; the report's "global loss").

    loss = (1 - alpha) CE(cls, y) + alpha D(dist, teacher)
    soft:  D = tau^2 KL(softmax(teacher / tau) || softmax(dist / tau))
    hard:  D = CE(dist, argmax teacher), never smoothed

The class head never sees the teacher and the distillation head never sees the labels. DeiT's released code divides the KL
by B K (`numel`), the paper and the report by B (`batchmean`): K times apart, so tau and alpha mean different things.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(cls_logits: Tensor, dist_logits: Tensor | None, target: Tensor, teacher_logits: Tensor | None = None,
                      kind: str = "none", alpha: float = 0.5, tau: float = 1.0, reduction: str = "batchmean",
                      smoothing: float = 0.0) -> Tensor:
    """The scalar loss in fp32 (fp64 for fp64 logits): logits (B, K), target int64 (B,) or soft (B, K) -> ()."""
    wide = torch.promote_types(cls_logits.dtype, torch.float32)
    soft = target.to(wide) if target.is_floating_point() else target
    base = F.cross_entropy(cls_logits.to(wide), soft, label_smoothing=smoothing)
    if kind == "none":
        return base
    student, teacher = dist_logits.to(wide), teacher_logits.to(wide)  # (B, K)
    if kind == "hard":
        distillation = F.cross_entropy(student, teacher.argmax(dim=-1))
    else:
        log_p, log_q = F.log_softmax(student / tau, dim=-1), F.log_softmax(teacher / tau, dim=-1)
        total = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        distillation = total * (tau * tau / (student.shape[0] if reduction == "batchmean" else student.numel()))
    return (1.0 - alpha) * base + alpha * distillation
