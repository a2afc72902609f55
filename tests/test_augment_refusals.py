"""The op `augment`: what every backend must refuse, and in which words."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from augment_plans import MEAN, STD, random_images, random_plan
from deit_fast import ops
from deit_fast.backend import BackendError, KernelError, Offer
from deit_fast.data.plan import Plan
from deit_fast.kernels import cpu, cuda
from deit_fast.kernels.cuda import augment as launcher
from deit_fast.ops.augment import OP
from deit_fast.ops.augment_values import check_values
from needs import skip_or_fail

op_module = importlib.import_module("deit_fast.ops.augment")  # the package's attribute of that name is the op

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


def batch(B: int, source: tuple[int, int], size: tuple[int, int], layout: str = "chw", recount: int = 1,
          seed: int = 0) -> tuple[Tensor, Tensor, Plan]:
    M = 2 * B + 1
    return random_images(M, *source, layout), torch.arange(M) % 10, random_plan(B, M, source, size, recount, seed=seed)


def wrong_inputs(field: str, row: int | tuple[int, int], value: float) -> tuple[Tensor, Tensor, Plan]:
    """Images, labels and a plan for 32x32, a value of BAD_VALUES in it."""
    images, labels, plan = batch(4, (32, 32), (32, 32), "chw", 1)
    tensor = getattr(plan, field).clone()
    tensor[row if isinstance(row, tuple) else (row, *(0,) * (tensor.dim() - 1))] = value
    if field == "jitter_order":
        tensor[row, 1:] = value
    return images, labels, replace(plan, **{field: tensor})


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])  # triton: test_triton_augment.py
@pytest.mark.parametrize(("field", "row", "value", "text"), BAD_VALUES)
def test_values_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, backend: str, field: str,
                                    row: int | tuple[int, int], value: float, text: str) -> None:
    """On a CPU always, on a GPU with DEIT_FAST_CHECK=1."""
    if OP.why_not_here(backend):
        skip_or_fail(backend, OP.why_not_here(backend))
    monkeypatch.setattr(op_module, "_CHECK", backend == "cuda")
    device = "cuda" if backend == "cuda" else "cpu"
    images, labels, plan = wrong_inputs(field, row, value)
    with pytest.raises(ValueError, match=f"augment: {text}"):
        ops.augment(images.to(device), labels.to(device), plan.to(device), MEAN, STD, 10, backend=backend)


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
    ({"images": torch.zeros(7, 1, 8, 9, dtype=torch.uint8)}, ValueError,
     r"images must have shape .*, got \(7, 1, 8, 9\)\. .* without a copy, by images\.expand\(-1, 3, -1, -1\)\.$"),
    ({"images": torch.zeros(7, 8, 9, 1, dtype=torch.uint8)}, ValueError,
     r"images must have shape .* by images\.expand\(-1, -1, -1, 3\)\.$"),
    ({"images": torch.zeros(7, 4, 8, 9, dtype=torch.uint8)}, ValueError,
     r"images must have shape \(M, 3, H, W\) or \(M, H, W, 3\), got \(7, 4, 8, 9\)\.$"),
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


# ---- a build for other GPUs ----

@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The CUDA backend, alone in the automatic order, with a module whose launches end in `.error`.

    The images stay on the CPU, so what a launcher asks of their GPU is stubbed.
    """
    stub = SimpleNamespace(error="augment_fwd: no kernel image is available for execution on the device", launches=0,
                           augment_workspace=lambda *sizes: 64)

    def augment_fwd(*arguments: object) -> None:
        stub.launches += 1
        raise RuntimeError(stub.error)

    stub.augment_fwd = augment_fwd
    monkeypatch.setattr(launcher, "module", stub)
    failed: dict[torch.device, str] = {}
    for module in (cuda, launcher):
        monkeypatch.setattr(module, "FAILED", failed)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setitem(op_module._modules, "cuda", launcher)
    monkeypatch.setattr("deit_fast.backend.BY_NAME_ONLY", ())
    for name in tuple(OP.offers):
        monkeypatch.delitem(OP.offers, name)
    monkeypatch.setitem(OP.offers, "cuda", Offer(lambda: None, lambda images, *_: failed.get(images.device)))
    return stub


def test_a_build_for_other_gpus_steps_down(unbuilt: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    """The automatic order says so once and serves the call all the same; from then on why_not gives the reason."""
    inputs = batch(2, (8, 8), (8, 8), "chw", 1)
    expected, _ = ops.augment(*inputs, MEAN, STD, 10, backend="reference")
    for _ in range(2):
        assert torch.equal(ops.augment(*inputs, MEAN, STD, 10)[0], expected)
    said = capsys.readouterr().err
    assert said.count("\n") == unbuilt.launches == 1
    assert "not built for Some GPU" in said and "DEIT_FAST_CUDA_ARCHS=86" in said and "'reference' serves" in said
    with pytest.raises(BackendError, match="cannot serve this call: the CUDA extension was not built for Some GPU"):
        ops.augment(*inputs, MEAN, STD, 10, backend="cuda")
    gpu = SimpleNamespace(device=torch.device("cuda", 1))
    assert launcher.why_not(gpu) is None
    launcher.FAILED[gpu.device] = "so"
    assert launcher.why_not(gpu) == "so"


def test_a_build_for_other_gpus_by_name_raises(unbuilt: SimpleNamespace) -> None:
    with pytest.raises(KernelError, match="augment: the CUDA extension was not built for Some GPU"):
        ops.augment(*batch(2, (8, 8), (8, 8), "chw", 1), MEAN, STD, 10, backend="cuda")


def test_other_errors_of_a_launch_pass(unbuilt: SimpleNamespace) -> None:
    """A defect must not be taken for a GPU that is not served."""
    unbuilt.error = "augment_fwd: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        ops.augment(*batch(2, (8, 8), (8, 8), "chw", 1), MEAN, STD, 10)
    assert not isinstance(caught.value, KernelError) and not launcher.FAILED
