"""NativeOp on a toy kernel: gradients, saved tensors, compiled code, opcheck, and what must not be differentiable twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from deit_fast.backend import OPS, BackendError, use_backend
from deit_fast.kernels import cpu
from deit_fast.ops.registration import NativeOp

calls: list[tuple] = []


def _toy_module() -> ModuleType:
    """y = x * w + r, where backward gets x * w saved."""
    module = ModuleType("deit_fast.kernels.cpu.toy_axpy")

    def forward(x, w, b, r, power, save):
        y = x * w * power + r
        return y if b is None else y + b, [x * w] if save else []

    def backward(grad, saved, needs, x, w, b, r, power):
        assert r is None and len(saved) == 1
        calls.append(tuple(needs))
        full = (grad * w * power, (grad * x).sum(0) * power, None if b is None else grad.sum(0))
        return [g if need and g is not None else x.new_empty(0) for g, need in zip(full, needs)]

    module.why_not = lambda x, *_: None if x.dtype == torch.float32 else "only float32"
    module.forward, module.backward = forward, backward
    module.saved_like = lambda x, w, b, r, power: [x.new_empty(x.shape)]
    return module


@pytest.fixture(scope="module")
def toy() -> Iterator[NativeOp]:
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    sys.modules["deit_fast.kernels.cpu.toy_axpy"] = _toy_module()
    yield NativeOp("toy_axpy", ("cpu",), "Tensor x, Tensor w, Tensor? b, Tensor r, float power", grads=("x", "w", "b"),
                   out=lambda x, *_: x.new_empty(x.shape), added="r")
    del OPS["toy_axpy"]  # other tests compare the table of ops with a fresh process's


def tensors(requires_grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=requires_grad) for shape in ((4, 3), (3,), (3,), (4, 3))]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(toy: NativeOp, compiled: bool) -> None:
    x, w, b, r = tensors()
    call = torch.compile(toy, fullgraph=True) if compiled else toy
    y = call("cpu", x, w, b, r, 2.0)
    grads = torch.autograd.grad(y.square().sum(), (x, w, b, r))
    expected = torch.autograd.grad((x * w * 2.0 + r + b).square().sum(), (x, w, b, r))
    for grad, truth in zip(grads, expected):
        torch.testing.assert_close(grad, truth)


def test_frozen_and_absent_arguments(toy: NativeOp) -> None:
    x, w, _, r = tensors()
    w.requires_grad_(False)
    calls.clear()
    toy("cpu", x, w, None, r, 1.0).sum().backward()
    assert calls == [(True, False, False)]
    assert w.grad is None and r.grad is not None


def test_no_grad_saves_nothing(toy: NativeOp) -> None:
    with torch.no_grad():
        y = toy("cpu", *tensors(), 1.0)
    assert y.grad_fn is None and not y.requires_grad


def test_once_differentiable(toy: NativeOp) -> None:
    x, w, b, r = tensors()
    (grad,) = torch.autograd.grad(toy("cpu", x, w, b, r, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_vmap_and_forward_mode_raise(toy: NativeOp) -> None:
    x, w, b, r = tensors()
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda row: toy("cpu", row[None], w, b, row[None], 1.0))(x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda v: toy("cpu", v, w, b, r, 1.0), (x,), (x,))


def test_opcheck(toy: NativeOp) -> None:
    x, w, b, r = tensors(requires_grad=False)
    torch.library.opcheck(toy.forward, (x, w, b, r, 1.0, True, "cpu"))
    torch.library.opcheck(toy.backward, (x, [x], [True, True, False], x, w, None, None, 1.0, "cpu"))


def test_selection(toy: NativeOp) -> None:
    x, w, b, r = tensors()
    call = (x, w, b, r, 1.0)
    assert toy.op.select(None, *call) == "cpu"
    assert toy.op.select(None, x.double(), *call[1:]) == "reference"  # the automatic order steps down
    assert toy.op.select("reference", *call) == "reference"
    with pytest.raises(BackendError, match="only float32. Usable here: reference"):  # a named backend does not
        toy.op.select("cpu", x.double(), *call[1:])
    with pytest.raises(BackendError, match="'triton' is not offered. Usable here: reference, cpu"):
        toy.op.select("triton", *call)
    with pytest.raises(BackendError, match="there is no backend 'tritn'"):
        toy.op.select("tritn", *call)
    with use_backend("reference"):
        assert toy.op.select(None, *call) == "reference"
        assert toy.op.select("cpu", *call) == "cpu"  # the call's own argument wins
        with use_backend(toy_axpy="cpu"):
            assert toy.op.select(None, *call) == "cpu"
    assert toy.op.select(None, *call) == "cpu"
