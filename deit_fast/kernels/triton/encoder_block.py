"""Triton encoder block: its four kernels one after the other."""

from __future__ import annotations

from ..encoder_block import Chain
from . import attention, layernorm_linear, layernorm_mlp, linear_residual

_chain = Chain(layernorm_linear, attention, linear_residual, layernorm_mlp)
why_not, forward, saved_like, backward = _chain.why_not, _chain.forward, _chain.saved_like, _chain.backward
