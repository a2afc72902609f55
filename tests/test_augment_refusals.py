"""The op `augment`: what every backend must refuse, and in which words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from augment_plans import MEAN, STD
from deit_fast import ops
from deit_fast.backend import BackendError
from deit_fast.kernels import cpu
from deit_fast.ops.augment import OP
from deit_fast.ops.augment_values import check_values
from needs import skip_or_fail
from test_augment import batch

BAD_VALUES = [  # field, row, value, how the message begins
    ("index", 2, -1, r"plan.index must be in \[0, 8\], got -1 in row 2"), ("index", 0, 9, "plan.index"),
    ("crop", 1, -33, r"plan.crop \(y\) must be in \[-32, 32\], got -33 in row 1"),
    ("crop", 1, 2**31 - 1, r"plan.crop \(y\)"),
    ("resized_crop", 1, 33, r"plan.resized_crop must be boxes \(y, x, h, w\) inside 32x32"),
    ("resized_crop", 0, -1, "plan.resized_crop"),
    ("jitter_order", 3, 0, "plan.jitter_order must be a permutation of 0, 1, 2, 3, got"),
    ("jitter_order", 3, 255, "plan.jitter_order"),
    ("jitter", 3, -1, "plan.jitter must be in"), ("jitter", 0, (64 << 16) + 1, "plan.jitter"),
    ("jitter", (2, 3), 32769, r"plan.jitter \(hue\) must be in \[-32768, 32768\]"),
    ("jitter", (0, 3), -32769, r"plan.jitter \(hue\)"),
    ("erase", 1, 33, r"plan.erase must be boxes \(y, x, h, w\) inside 32x32"), ("erase", 1, -1, "plan.erase"),
    ("erase", 1, 2**31 - 1, "plan.erase"),
    ("partner", 3, 4, r"plan.partner must be in \[0, 3\], got 4 in row 3"), ("partner", 0, -(2**63), "plan.partner"),
    ("lam", 2, -1e-6, r"plan.lam must be in \[0, 1\]"), ("lam", 0, 1.0001, "plan.lam"),
    ("lam", 0, float("nan"), "plan.lam"),
    ("cut", 3, 40, r"plan.cut must be boxes"), ("cut", 3, -(2**31), "plan.cut"),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("field", "row", "value", "text"), BAD_VALUES)
def test_values_are_refused_by_name(backend: str, field: str, row: int | tuple[int, int], value, text: str) -> None:
    if OP.why_not_here(backend):
        skip_or_fail(backend, OP.why_not_here(backend))
    images, labels, plan = batch(4, (32, 32), (32, 32), "chw", 1)
    images, labels = images[:9], labels[:9]
    tensor = getattr(plan, field).clone()
    tensor[row if isinstance(row, tuple) else (row, *(0,) * (tensor.dim() - 1))] = value
    if field == "jitter_order":
        tensor[row, 1:] = value
    with pytest.raises(ValueError, match=f"augment: {text}"):
        ops.augment(images, labels, replace(plan, **{field: tensor}), MEAN, STD, 10, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_labels_are_refused(backend: str) -> None:
    if OP.why_not_here(backend):
        skip_or_fail(backend, OP.why_not_here(backend))
    images, labels, plan = batch(4, (8, 8), (8, 8), "chw", 1)
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 9\], got {bad} in label of row"):
            ops.augment(images, labels.clone().fill_(bad), plan, MEAN, STD, 10, backend=backend)


def test_kernel_and_message_agree_on_what_is_wrong() -> None:
    """Random corruptions: the kernel's own check and check_values must accept and refuse the same plans."""
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    generator, refused = torch.Generator().manual_seed(0), 0
    for seed in range(210):
        images, labels, plan = batch(3, (9, 12), (10, 8), "chw", 2, seed=seed)
        name, tensor = list(plan.tensors().items())[seed % 14]
        tensor = tensor.clone()
        flat = tensor.view(-1)
        at = int(torch.randint(len(flat), (), generator=generator))
        if tensor.dtype != torch.bool:
            spread = 30_000 if name == "jitter" else 12
            flat[at] += int(torch.randint(-spread, spread + 1, (), generator=generator))
        plan = replace(plan, **{name: tensor})
        try:
            check_values(images, labels, list(plan.tensors().values()), 10, 10, 8)
        except ValueError as error:
            refused += 1
            with pytest.raises(ValueError) as caught:
                ops.augment(images, labels, plan, MEAN, STD, 10, (10, 8), backend="cpu")
            assert str(caught.value) == str(error)
        else:
            ops.augment(images, labels, plan, MEAN, STD, 10, (10, 8), backend="cpu")
    assert 20 < refused < 190


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"images": torch.zeros(7, 3, 8, 8)}, TypeError, "images must be a uint8 tensor, got torch.float32"),
    ({"images": torch.zeros(7, 8, 8, dtype=torch.uint8)}, ValueError,
     r"images must have shape \(M, 3, H, W\) or \(M, H, W, 3\)"),
    ({"images": torch.zeros(7, 1, 8, 8, dtype=torch.uint8)}, ValueError, "images must have shape"),
    ({"images": torch.zeros(7, 3, 0, 8, dtype=torch.uint8)}, ValueError, "images must have 1 to 32768 pixels"),
    ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError,
     "there are no images for a plan of 3 rows"),
    ({"labels": torch.zeros(7)}, TypeError, "labels must be a tensor of torch.int64"),
    ({"labels": torch.zeros(6, dtype=torch.int64)}, ValueError, r"labels must have shape \(7,\), got \(6,\)"),
    ({"labels": torch.zeros(7, dtype=torch.int64, device="meta")}, ValueError, "labels must be on cpu"),
    ({"crop": torch.zeros(3, 2)}, TypeError, "plan.crop must be a tensor of torch.int32"),
    ({"crop": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"plan.crop must have shape \(3, 2\), got \(2, 2\)"),
    ({"erase": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, r"plan.erase must be \(B, recount, 4\) int32"),
    ({"resized_crop": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"plan.resized_crop must have shape \(3, 4\)"),
    ({"resized_crop": torch.zeros(0, 3, dtype=torch.int32)}, ValueError, r"plan.resized_crop must have shape \(0, 4\)"),
    ({"jitter": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, r"plan.jitter_order must have shape \(3, 3\)"),
    ({"jitter": torch.zeros(3, 5, dtype=torch.int32)}, ValueError, r"plan.jitter_order must have shape \(3, 3\)"),
    ({"vflip": torch.zeros(3)}, TypeError, "plan.vflip must be a tensor of torch.bool"),
    ({"grayscale": torch.zeros(2, dtype=torch.bool)}, ValueError, r"plan.grayscale must have shape \(3,\)"),
    ({"remode": "noise"}, ValueError, "plan.remode must be 'pixel', 'rand' or 'const', got 'noise'"),
    ({"padding_mode": "edge"}, ValueError, "plan.padding_mode must be 'constant' or 'reflect', got 'edge'"),
    ({"mean": (0.5,)}, ValueError, "mean must be 3 finite numbers"),
    ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must be 3 finite positive numbers"),
    ({"num_classes": 0}, ValueError, "num_classes must be 1 or more"),
    ({"smoothing": 1.0}, ValueError, r"smoothing must be in \[0, 1\)"),
    ({"size": (8, 0)}, ValueError, "size must be 1 to 32768"),
    ({"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16 or float16"),
])
def test_calls_are_refused(change: dict, error: type[Exception], text: str) -> None:
    images, labels, plan = batch(3, (8, 8), (8, 8), "chw", 1)
    fields = {name: change.pop(name) for name in list(change) if hasattr(plan, name)}
    plan = replace(plan, **fields)
    call = {"images": images, "labels": labels, "plan": plan, "mean": MEAN, "std": STD, "num_classes": 10}
    with pytest.raises(error, match=f"augment: {text}"):
        ops.augment(**{**call, **change})


def test_backends_by_name() -> None:
    inputs = batch(2, (8, 8), (8, 8), "chw", 1)
    with pytest.raises(BackendError, match="augment: there is no backend 'metal'"):
        ops.augment(*inputs, MEAN, STD, 10, backend="metal")
    if OP.why_not_here("triton"):
        with pytest.raises(BackendError, match="augment: backend 'triton' cannot serve this call"):
            ops.augment(*inputs, MEAN, STD, 10, backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA GPU is available"):
            ops.augment(*inputs, MEAN, STD, 10, backend="cuda")
