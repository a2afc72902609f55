"""All blocks of an encoder as one call, for inference.

For one image a block of the report's size spends more time beside its kernels than in them (`encoder_block`; NOTES.md
has the figures). What needs gradients goes block by block: autograd frees a block's activations as soon as its backward
is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deit_fast.backend import Op

from .checks import autocast_dtype, cast, check, without_autocast
from .encoder_block import OP as ENCODER_BLOCK
from .encoder_block import PARTS as OPS_OF_A_BLOCK
from .encoder_block import check_parameters, check_stream, encoder_block, is_small
from .registration import launchers, register

PARTS = (*OPS_OF_A_BLOCK, ENCODER_BLOCK)
_offers, _modules = launchers("encoder", ("cpu",))
OP = Op("encoder", _offers, lambda x, *_: ("cpu",) if is_small(x) else (), tuple(op.name for op in PARTS))


def _forward(x: Tensor, parameters: list[Tensor | None], num_heads: int, eps: float, backend: str) -> Tensor:
    return _modules[backend].forward(x, parameters, num_heads, eps)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_operator = register(f"{OP.name}_forward",
                     "(Tensor x, Tensor?[] parameters, int num_heads, float eps, str backend) -> Tensor",
                     _forward, _fake)


def encoder(x: Tensor, blocks: Sequence[Sequence[Tensor | None]], num_heads: int, eps: float = 1e-6, *,
            backend: str | None = None) -> Tensor:
    """x through pre-norm encoder blocks without dropout: (B, N, C) -> (B, N, C), in the dtype of x (autocast's).

    Args:
        x: (B, N, C) the residual stream.
        blocks: of each block its twelve parameters, in the order and the shapes of `encoder_block`.
        num_heads: H, which divides C.
        eps: added to the variances.
        backend: who computes it; None: see `deit_fast.use_backend`.

    Equal to `encoder_block` called for each block, which is also what happens where a gradient is wanted, or no backend
    serves the whole, or somebody named one for a part. Raises as `encoder_block` does.
    """
    _check(x, blocks, num_heads, eps)
    (x,) = cast(autocast_dtype(x), x)
    parameters = [tensor for tensors in blocks for tensor in tensors]
    call = (x, parameters, num_heads, eps)
    with without_autocast(x):
        if _is_whole(backend, call):
            return OP.run(backend, call, lambda chosen: _computed(chosen, blocks, call))
        return _composed(blocks, call, backend)


def freeze_encoder(blocks: Sequence[Sequence[Tensor | None]], num_heads: int, eps: float,
                   dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`encoder` as a function of x alone, contiguous (B, N, C) of this dtype, with the parameters as they are now.

    Arguments and errors are those of `encoder`; BackendError where C++ cannot serve. Without a block it is a copy.
    """
    parameters = [tensor for tensors in blocks for tensor in tensors]
    if not parameters:
        return Tensor.clone
    x = torch.empty((1, 1, parameters[0].shape[0]), dtype=dtype)
    _check(x, blocks, num_heads, eps)
    OP.select("cpu", x, parameters, num_heads, eps)  # or raise
    return _modules["cpu"].Frozen(dtype, parameters, num_heads, eps)


def _check(x: Tensor, blocks: Sequence[Sequence[Tensor | None]], num_heads: int, eps: float) -> None:
    check_stream(OP.name, x, num_heads, eps)
    for index, tensors in enumerate(blocks):
        check(len(tensors) == 12, OP.name, f"block {index} must have 12 parameters, got {len(tensors)}")
        check_parameters(f"{OP.name}: block {index}", x, tensors)


def _computed(backend: str, blocks: Sequence[Sequence[Tensor | None]], call: tuple) -> Tensor:
    return _composed(blocks, call) if backend == "reference" else _operator(*call, backend)


def _composed(blocks: Sequence[Sequence[Tensor | None]], call: tuple, backend: str | None = None) -> Tensor:
    x, _, num_heads, eps = call
    x = x if blocks else x.clone()
    for tensors in blocks:
        x = encoder_block(x, *tensors, num_heads, eps, backend=backend)
    return x


def _is_whole(backend: str | None, call: tuple) -> bool:
    """Whether one backend is to serve all blocks at once: no gradient is wanted, nobody chose otherwise."""
    x, parameters, *_ = call
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *parameters)):
        return False
    name, parts = OP.asked(backend), [op.asked(backend) for op in PARTS]
    if name == "reference" or any(part not in (None, name) for part in parts):
        return False
    if name is None:
        return bool(OP.order(*call))
    return name in tuple(OP.offers) or None in parts  # a name meant for the encoder itself is served or refused
