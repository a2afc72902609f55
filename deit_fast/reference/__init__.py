"""Every op in plain, traceable PyTorch with PyTorch's autograd: the specification, the fallback and the fair baseline.

This package imports only torch, and nothing in it is ever a registered op, so `torch.compile` sees straight through it.
"""

from .augment import augment
from .block import attention, encoder_block, layernorm_linear, layernorm_mlp, linear_residual
from .loss import distillation_loss

__all__ = ["attention", "augment", "distillation_loss", "encoder_block", "layernorm_linear", "layernorm_mlp",
           "linear_residual"]
