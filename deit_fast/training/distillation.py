"""The objective of a step: the student's two heads, the labels, and a frozen teacher that sees the same images.

DeiT's rules (Touvron et al. 2020): the teacher gets the very batch that the student gets, after every augmentation and
mixing; its gradients are never taken, its batch norm never updates, and it is in no optimizer, average or checkpoint of
the student. Its own normalisation is restored by one affine map per channel, because a teacher that was trained with
other statistics than the student's sees wrong colours otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast import ops
from deit_fast.training.config import DistillationConfig


class TeacherInput(nn.Module):
    """Images as the teacher was trained on them, from the student's: (B, 3, H, W) -> (B, 3, S, S).

    mean, std are the student's and own_mean, own_std the teacher's, per channel in 0..1 scale; S is input_size, or the
    images' own size when it is None.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], own_mean: Sequence[float], own_std: Sequence[float],
                 input_size: int | None = None) -> None:
        super().__init__()
        self.input_size = input_size
        self.same = (*mean, *std) == (*own_mean, *own_std)
        scale = [s / own for s, own in zip(std, own_std)]
        shift = [(m - own) / s for m, own, s in zip(mean, own_mean, own_std)]
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.same:
            images = torch.addcmul(self.shift.to(images.dtype), images, self.scale.to(images.dtype))
        if self.input_size is not None and self.input_size != images.shape[-1]:
            images = F.interpolate(images, (self.input_size, self.input_size), mode="bicubic", antialias=True,
                                   align_corners=False)
        return images


class Teacher(nn.Module):
    """A frozen classifier of the student's images: (B, 3, H, W) -> (B, K) logits.

    It stays in evaluation mode whatever mode a parent is put in.
    """

    def __init__(self, network: nn.Module, input: TeacherInput) -> None:
        super().__init__()
        self.input = input
        self.network = network
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        """This teacher, in evaluation mode as ever."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.input(images))


class Objective:
    """The loss of a batch, from what the model returns in training mode.

    One head (B, K) learns the targets. Of two heads, "cls+cls" means that both do (the mean of two cross-entropies) and
    "cls+dist" that the second learns from the teacher, whose logits are rounded to fp16 as stored ones are
    (`teacher_logits.py`).
    """

    def __init__(self, tokens: str, config: DistillationConfig, teacher: Teacher | None) -> None:
        self.tokens, self.config, self.teacher = tokens, config, teacher

    def __call__(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor,
                 teacher_logits: Tensor | None = None) -> Tensor:
        """() fp32; targets are (B, K) probabilities or (B,) indices.

        The teacher sees images (B, 3, H, W), unless its logits (B, K) are given.
        """
        if self.tokens == "cls":
            return ops.distillation_loss(outputs, None, targets)
        cls, dist = outputs
        if self.tokens == "cls+cls":
            return (ops.distillation_loss(cls, None, targets) + ops.distillation_loss(dist, None, targets)) / 2
        if teacher_logits is None:
            teacher_logits = self.teacher(images).half()
        c = self.config
        return ops.distillation_loss(cls, dist, targets, teacher_logits.float(), c.distillation_type,
                                     c.distillation_alpha, c.distillation_tau, c.distillation_reduction)
