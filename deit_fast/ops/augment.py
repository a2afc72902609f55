"""Augmentation of a batch on the device: one kernel from resident uint8 images to a normalised batch and its targets.

Per-image pipelines spend their time between operators: torchvision's runs some twenty of them per image, and MixUp
another handful per batch. Here the decisions are drawn beforehand (`data.augmentation.sample_plan`) and one pass over
the pixels applies them all, in DeiT's order: crop or resize, flip, color, normalise, erase, mix. reference/augment.py
and reference/geometry.py are the specification.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deit_fast import reference
from deit_fast.backend import Op
from deit_fast.reference.augment import output_size
from deit_fast.reference.geometry import source_size

from .augment_values import check_values
from .registration import launchers, register

if TYPE_CHECKING:
    from deit_fast.data.plan import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIDE = 1 << 15  # coordinates, box sides and pixel numbers stay well inside an int32

# The plan's tensors: name, dtype, shape after (B,); None where it may be one of several (see _check_plan).
COLUMNS = (
    ("index", torch.int64, ()), ("resized_crop", torch.int32, None), ("bicubic", torch.bool, ()),
    ("crop", torch.int32, (2,)), ("flip", torch.bool, ()), ("vflip", torch.bool, ()),
    ("jitter_order", torch.uint8, None), ("jitter", torch.int32, None), ("grayscale", torch.bool, ()),
    ("erase", torch.int32, None), ("noise_key", torch.int64, ()), ("partner", torch.int64, ()),
    ("lam", torch.float32, ()), ("cut", torch.int32, (4,)),
)
REMODES, PADDING_MODES = ("pixel", "rand", "const"), ("constant", "reflect")

_CHECK = os.environ.get("DEIT_FAST_CHECK") == "1"  # check values on GPUs too, at the price of a synchronisation
_offers, _modules = launchers("augment", ("cpu", "cuda", "triton"))
OP = Op("augment", _offers)


def augment(images: Tensor, labels: Tensor, plan: Plan, mean: Sequence[float], std: Sequence[float], num_classes: int,
            size: int | tuple[int, int] | None = None, smoothing: float = 0.0, dtype: torch.dtype = torch.float32,
            channels_last: bool = False, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The batch that a plan makes of uint8 images: (B, 3, H', W') normalised, and its targets (B, K) in fp32.

    Args:
        images: (M, 3, H, W) or (M, H, W, 3) uint8, any strides; never copied. (M, 3, H, 3) counts as the first. Gray
            ones are expanded: images.expand(-1, 3, -1, -1) takes no memory.
        labels: (M,) int64 in [0, K).
        plan: B rows, on the images' device; the table in `data.plan.Plan` gives every field's range.
        mean, std: of the three channels, on the scale 0..1; the output is (pixel / 255 - mean) / std.
        num_classes: K.
        size: H', or (H', W'); default: the images' own.
        smoothing: eps of the one-hots, 1 - eps + eps / K and eps / K, which are then mixed like the images. A loss
            must not smooth them again.
        dtype: of the batch: float32, bfloat16 or float16, rounded once at the end.
        channels_last: the batch's memory format.
        backend: who computes it; None: see `deit_fast.use_backend`.

    Not differentiable. Raises ValueError or TypeError for shapes, dtypes, devices and, on the CPU, values that do not
    fit. On a GPU values are clamped into range; DEIT_FAST_CHECK=1 in the environment checks them there too, with a
    synchronisation. BackendError for a backend that cannot serve the call.

    MixUp: Zhang et al. 2018; CutMix: Yun et al. 2019; random erasing: Zhong et al. 2017; order and defaults: Touvron et
    al. 2021 (DeiT).
    """
    _check(images, labels, plan, mean, std, num_classes, smoothing, dtype)
    height, width = output_size(images, size)
    if not 0 < min(height, width) <= max(height, width) <= MAX_SIDE:
        _refuse(f"size must be 1 to {MAX_SIDE} pixels a side, got {height}x{width}")
    tensors = [getattr(plan, name) for name, _, _ in COLUMNS]
    call = (images, labels, tensors, plan.remode, plan.padding_mode, list(mean), list(std), num_classes, height, width,
            smoothing, dtype, channels_last)

    def compute(chosen: str) -> tuple[Tensor, Tensor]:
        if chosen != "reference":
            return _operator(*call, chosen)
        if (images.device.type == "cpu" or _CHECK) and not torch.compiler.is_compiling():
            check_values(images, labels, tensors, num_classes, height, width)
        return reference.augment(images, labels, plan, mean, std, num_classes, (height, width), smoothing, dtype,
                                 channels_last)

    return OP.run(backend, call, compute)


def _check(images: Tensor, labels: Tensor, plan: Plan, mean: Sequence[float], std: Sequence[float], num_classes: int,
           smoothing: float, dtype: torch.dtype) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"augment: images must be a uint8 tensor, got {_kind(images)}.")
    shape = images.shape
    if len(shape) != 4 or shape[1] != 3 and shape[3] != 3:
        _refuse(f"images must have shape (M, 3, H, W) or (M, H, W, 3), got {tuple(shape)}{_of_gray(shape)}")
    source = source_size(images)
    if not 0 < min(source) <= max(source) <= MAX_SIDE:
        _refuse(f"images must have 1 to {MAX_SIDE} pixels a side, got {tuple(shape)}")
    M, B, device = shape[0], plan.index.shape[0], images.device
    if M == 0 and B > 0:
        _refuse(f"there are no images for a plan of {B} rows")
    _check_tensor("labels", labels, torch.int64, (M,), device)
    _check_plan(plan, B, device)
    if len(mean) != 3 or not all(map(math.isfinite, mean)):
        _refuse(f"mean must be 3 finite numbers, got {tuple(mean)}")
    if len(std) != 3 or not all(map(math.isfinite, std)) or min(std) <= 0:
        _refuse(f"std must be 3 finite positive numbers, got {tuple(std)}")
    if num_classes < 1:
        _refuse(f"num_classes must be 1 or more, got {num_classes}")
    if not 0.0 <= smoothing < 1.0:
        _refuse(f"smoothing must be in [0, 1), got {smoothing}")
    if dtype not in DTYPES:
        raise TypeError(f"augment: dtype must be float32, bfloat16 or float16, got {dtype}.")


def _check_plan(plan: Plan, B: int, device: torch.device) -> None:
    jitter = (B, 4 if plan.jitter.shape[-1:] == (4,) else 3)
    shapes = {"resized_crop": (len(plan.resized_crop) and B, 4), "jitter_order": jitter, "jitter": jitter}
    for name, dtype, rest in COLUMNS:
        if name != "erase":
            shape = shapes[name] if rest is None else (B, *rest)
            _check_tensor("plan." + name, getattr(plan, name), dtype, shape, device)
    erase = plan.erase
    if erase.dim() != 3 or erase.dtype != torch.int32:
        raise TypeError(f"augment: plan.erase must be (B, recount, 4) int32, got {tuple(erase.shape)} {erase.dtype}.")
    _check_tensor("plan.erase", erase, torch.int32, (B, erase.shape[1], 4), device)
    if plan.remode not in REMODES:
        _refuse(f"plan.remode must be {_either(REMODES)}, got {plan.remode!r}")
    if plan.padding_mode not in PADDING_MODES:
        _refuse(f"plan.padding_mode must be {_either(PADDING_MODES)}, got {plan.padding_mode!r}")


def _either(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"


def _check_tensor(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        raise TypeError(f"augment: {what} must be a tensor of {dtype}, got {_kind(tensor)}.")
    if tensor.shape != shape:
        _refuse(f"{what} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        _refuse(f"{what} must be on {device} like the images, got {tensor.device}")


def _of_gray(shape: torch.Size) -> str:
    """How images of one channel become three without a copy; nothing for other shapes."""
    if len(shape) != 4 or 1 not in (shape[1], shape[3]):
        return ""
    sizes = "-1, 3, -1, -1" if shape[1] == 1 else "-1, -1, -1, 3"
    return f". Gray images take three channels, without a copy, by images.expand({sizes})"


def _kind(value: object) -> object:
    """The dtype of a tensor, the type's name of anything else."""
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def _refuse(message: str) -> None:
    """Raises ValueError. Texts are made only when they are needed: formatting a shape costs more than checking it."""
    raise ValueError(f"augment: {message}.")


def _new_outputs(images: Tensor, B: int, num_classes: int, height: int, width: int, dtype: torch.dtype,
                 channels_last: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised (B, 3, H', W') and (B, K)."""
    if channels_last:
        out = images.new_empty((B, height, width, 3), dtype=dtype).permute(0, 3, 1, 2)
    else:
        out = images.new_empty((B, 3, height, width), dtype=dtype)
    return out, images.new_empty((B, num_classes), dtype=torch.float32)


def _impl(images: Tensor, labels: Tensor, plan: list[Tensor], remode: str, padding_mode: str, mean: list[float],
          std: list[float], num_classes: int, height: int, width: int, smoothing: float, dtype: torch.dtype,
          channels_last: bool, backend: str) -> tuple[Tensor, Tensor]:
    if _CHECK and backend != "cpu":  # whose kernel checks them itself
        check_values(images, labels, plan, num_classes, height, width)
    out, targets = _new_outputs(images, plan[0].shape[0], num_classes, height, width, dtype, channels_last)
    in_range = _modules[backend].forward(images, labels, plan, remode, padding_mode, mean, std, num_classes, height,
                                         width, smoothing, dtype, channels_last, out=out, targets=targets)
    if not in_range:
        check_values(images, labels, plan, num_classes, height, width)
        raise AssertionError("the kernel refused a plan that check_values accepts")
    return out, targets


def _fake(images: Tensor, labels: Tensor, plan: list[Tensor], remode: str, padding_mode: str, mean: list[float],
          std: list[float], num_classes: int, height: int, width: int, smoothing: float, dtype: torch.dtype,
          channels_last: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _new_outputs(images, plan[0].shape[0], num_classes, height, width, dtype, channels_last)


_operator = register(
    "augment",
    "(Tensor images, Tensor labels, Tensor[] plan, str remode, str padding_mode, float[] mean, float[] std, "
    "SymInt num_classes, SymInt height, SymInt width, float smoothing, ScalarType dtype, bool channels_last, "
    "str backend) -> (Tensor, Tensor)", _impl, _fake)
