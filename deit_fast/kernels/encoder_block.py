"""The encoder block as a chain of a backend's four launchers, forward and backward, for every backend that has them.

A backend whose own kernel computes more of a block at once replaces its `encoder_block.py` by that kernel's launcher.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """A call of the block in the order of its schema; `ops/encoder_block.py` says what each is."""

    x: Tensor
    ln1_weight: Tensor
    ln1_bias: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    ln2_weight: Tensor
    ln2_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    num_heads: int
    eps: float
    dropout_p: float
    attn_dropout_p: float
    seed: Tensor | None
    attn_row_scale: Tensor | None
    mlp_row_scale: Tensor | None

    def layernorm_linear(self) -> tuple:
        """The call that makes qkv (B, N, 3C)."""
        return self.x, self.ln1_weight, self.ln1_bias, self.qkv_weight, self.qkv_bias, self.eps

    def attention(self, qkv: Tensor) -> tuple:
        """The call that makes y (B, N, C)."""
        return qkv, self.num_heads, None, self.attn_dropout_p, self.seed

    def linear_residual(self, y: Tensor, residual: Tensor | None) -> tuple:
        """The call that makes h (B, N, C), the stream between the block's halves."""
        return y, self.proj_weight, self.proj_bias, residual, self.dropout_p, self.seed, self.attn_row_scale

    def layernorm_mlp(self, h: Tensor) -> tuple:
        """The call that makes the block's output."""
        return (h, self.ln2_weight, self.ln2_bias, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias,
                self.eps, self.dropout_p, self.seed, self.mlp_row_scale)


class Chain:
    """The launcher of a block from those of its four ops (the contract of `ops/registration.py`).

    Backward gets qkv, y and h beside what the four save: in all what autograd keeps of the four ops.
    """

    def __init__(self, layernorm_linear: ModuleType, attention: ModuleType, linear_residual: ModuleType,
                 layernorm_mlp: ModuleType) -> None:
        self.qkv, self.attention, self.proj, self.mlp = layernorm_linear, attention, linear_residual, layernorm_mlp

    def why_not(self, *call: object) -> str | None:
        """Why one of the four cannot be served, or None."""
        a = Arguments(*call)
        qkv = a.x[..., :1].expand(*a.x.shape[:-1], 3 * a.x.shape[-1])  # its shape, without memory
        return (self.attention.why_not(*a.attention(qkv))
                or self.qkv.why_not(*a.layernorm_linear())
                or self.proj.why_not(*a.linear_residual(a.x, a.x))
                or self.mlp.why_not(*a.layernorm_mlp(a.x)))

    def forward(self, *call: object, save: bool) -> tuple[Tensor, list[Tensor]]:
        """(out (B, N, C), [qkv, y, h, then what the four save])."""
        a = Arguments(*call)
        qkv, qkv_saved = self.qkv.forward(*a.layernorm_linear(), save=save)
        y, attention_saved = self.attention.forward(*a.attention(qkv), save=save)
        h, proj_saved = self.proj.forward(*a.linear_residual(y, a.x), save=save)
        out, mlp_saved = self.mlp.forward(*a.layernorm_mlp(h), save=save)
        return out, [qkv, y, h, *qkv_saved, *attention_saved, *proj_saved, *mlp_saved] if save else []

    def saved_like(self, *call: object) -> list[Tensor]:
        """What forward saves, uninitialised."""
        a = Arguments(*call)
        between, groups = self._saved_like(a)
        return [*between, *(tensor for group in groups for tensor in group)]

    def backward(self, grad: Tensor, saved: list[Tensor], needs: list[bool], *call: object) -> list[Tensor]:
        """The gradients of x and the twelve parameters; the halves that nobody asks about are not computed."""
        a = Arguments(*call)
        qkv, y, h, *rest = saved
        _, groups = self._saved_like(a._replace(x=a.x.new_empty(a.x.shape, device="meta")))  # how many, without memory
        qkv_saved, attention_saved, proj_saved, mlp_saved = _split(rest, groups)
        before_y, before_h = any(needs[:5]), any(needs[:7])
        dh, *dmlp = self.mlp.backward(grad, mlp_saved, [before_h, *needs[7:]], *a.layernorm_mlp(h))
        if not before_h:
            return [*(grad.new_empty(0) for _ in range(7)), *dmlp]
        dy, *dproj = self.proj.backward(dh, proj_saved, [before_y, *needs[5:7]], *a.linear_residual(y, None))
        if not before_y:
            return [*(grad.new_empty(0) for _ in range(5)), *dproj, *dmlp]
        (dqkv,) = self.attention.backward(dy, attention_saved, [True], *a.attention(qkv))
        dx, *dqkv_parameters = self.qkv.backward(dqkv, qkv_saved, needs[:5], *a.layernorm_linear())
        if needs[0]:
            dx += dh  # x is the residual of the first half, too
        return [dx, *dqkv_parameters, *dproj, *dmlp]

    def _saved_like(self, a: Arguments) -> tuple[list[Tensor], list[list[Tensor]]]:
        """([qkv, y, h], what each of the four saves), uninitialised, on the device of a.x."""
        qkv = a.x.new_empty((*a.x.shape[:-1], 3 * a.x.shape[-1]))
        y, h = a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape)
        return [qkv, y, h], [
            self.qkv.saved_like(*a.layernorm_linear()), self.attention.saved_like(*a.attention(qkv)),
            self.proj.saved_like(*a.linear_residual(y, None)), self.mlp.saved_like(*a.layernorm_mlp(h))]


def _split(tensors: list[Tensor], like: list[list[Tensor]]) -> list[list[Tensor]]:
    """The tensors in groups as long as those of `like`."""
    rest = iter(tensors)
    return [[next(rest) for _ in group] for group in like]
