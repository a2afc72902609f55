"""The ops: public functions with one signature and several backends. `ops.attention(qkv, num_heads=8)`."""

from .attention import attention
from .augment import augment
from .distillation_loss import distillation_loss
from .encoder import encoder
from .encoder_block import encoder_block
from .layernorm_linear import layernorm_linear
from .layernorm_mlp import layernorm_mlp
from .linear_residual import linear_residual

__all__ = ["attention", "augment", "distillation_loss", "encoder", "encoder_block", "layernorm_linear",
           "layernorm_mlp", "linear_residual"]
