"""The checks that every public op makes once, in Python, before a pointer leaves it.

Everything here is known without reading a tensor's values, so nothing synchronises with a GPU. Texts say the fact:
"attention: qkv must have shape (B, N, 3*C) with C divisible by num_heads=8, got (2, 66, 190)."
"""

from __future__ import annotations

import numbers
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(condition: bool, op: str, message: str) -> None:
    """Raises ValueError "<op>: <message>." unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {message}.")


def check_tensor(op: str, name: str, value: object) -> None:
    """value is a tensor, and a dense one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}.")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}; call to_dense() on it.")


def check_number(op: str, name: str, value: object) -> None:
    """value is a real number (not a tensor, whose value would have to be fetched)."""
    if not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")


def check_activation(op: str, name: str, x: Tensor) -> None:
    """x is a floating-point tensor of a dtype that the ops compute in."""
    check_tensor(op, name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}.")


def check_parameter(op: str, name: str, parameter: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """A parameter has this shape, lies on x's device, and is fp32 or of x's dtype, as autocast is about to make it.

    Only a bias may be None.
    """
    if (isinstance(parameter, Tensor) and parameter.shape == shape and parameter.dtype is torch.float32
            and x.dtype is not torch.float64 and parameter.device == x.device and parameter.layout is torch.strided):
        return  # nearly every call; what follows finds the rest, and the words
    if parameter is None and name.endswith("bias"):
        return
    check_tensor(op, name, parameter)
    check(tuple(parameter.shape) == shape, op, f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
    dtype = autocast_dtype(x) or x.dtype
    if parameter.dtype != dtype and not (parameter.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
        raise TypeError(f"{op}: {name} must be float32 or of the activations' dtype {dtype}, got {parameter.dtype}.")
    check_device(op, name, parameter, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """The tensor lies on the device of x."""
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like the activations, got {tensor.device}.")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None, x: Tensor, name: str = "dropout_p") -> None:
    """0 <= dropout_p < 1 (it is called `name`), and the seed is None or a () int64 tensor on x's device."""
    check_number(op, name, dropout_p)
    check(0.0 <= dropout_p < 1.0, op, f"{name} must be in [0, 1), got {dropout_p}")
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be a 0-dim int64 tensor, got {getattr(seed, 'dtype', type(seed).__name__)}.")
    check(seed.dim() == 0, op, f"seed must be a 0-dim int64 tensor, got shape {tuple(seed.shape)}")
    check_device(op, "seed", seed, x)


def check_row_scale(op: str, row_scale: Tensor | None, x: Tensor, name: str = "row_scale") -> None:
    """row_scale (it is called `name`) is None or (B,) floating point on x's device, for x (B, ..., C)."""
    if row_scale is None:
        return
    check_activation(op, name, row_scale)
    check(x.dim() >= 2, op, f"{name} needs x of shape (B, ..., C), got {tuple(x.shape)}")
    check(tuple(row_scale.shape) == (x.shape[0],), op,
          f"{name} must have shape ({x.shape[0]},), got {tuple(row_scale.shape)}")
    check_device(op, name, row_scale, x)


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast is on for x's device; the meta device has none, and PyTorch does not answer the question for it."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is on for x's device and applies to x, else None."""
    if not autocast_is_on(x) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def cast(dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in `dtype`; unchanged when it is None."""
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off for x's device: an op's implementation picks its own dtypes."""
    if autocast_is_on(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
