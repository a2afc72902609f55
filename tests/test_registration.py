"""NativeOp on a toy kernel: gradients, saved tensors, compiled code, opcheck, and what must not be differentiable twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

from deit_fast.backend import OPS, BackendError, KernelError, Offer, use_backend
from deit_fast.kernels import cpu
from deit_fast.ops.registration import NativeOp
from needs import skip_or_fail

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


def _toy_reference(x, w, b, r, power):
    return x * w * power + r if b is None else x * w * power + r + b


@pytest.fixture(scope="module")
def toy() -> Iterator[NativeOp]:
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    sys.modules["deit_fast.kernels.cpu.toy_axpy"] = _toy_module()
    yield NativeOp("toy_axpy", _toy_reference, ("cpu",), "Tensor x, Tensor w, Tensor? b, Tensor r, float power", grads=("x", "w", "b"),
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


@pytest.fixture
def failing(toy: NativeOp, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """failing("forward") makes that half of the toy's kernel one that does not compile, as Triton's may turn out."""
    module, failed = toy.modules["cpu"], []
    before = module.why_not

    def fail(half: str) -> None:
        def launch(*_args: object, **_kwargs: object) -> None:
            failed.append("could not compile axpy_kernel here")
            raise KernelError(f"toy_axpy: {failed[-1]}.")
        monkeypatch.setattr(module, half, launch)

    reason = lambda *call: before(*call) or (failed[-1] if failed else None)  # noqa: E731
    monkeypatch.setitem(toy.op.offers, "cpu", Offer(lambda: None, reason))
    return fail


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_kernel_that_does_not_compile(toy: NativeOp, failing: Callable[[str], None], capsys, half: str) -> None:
    """The automatic order steps down within the call, whose numbers are the reference's, and says so once."""
    failing(half)
    for _ in range(2):
        x, w, b, r = tensors()
        w.requires_grad_(False)
        y = toy(None, x, w, b, r, 2.0)
        y.backward(torch.arange(12.0).view(4, 3))
        leaves = [t.detach().requires_grad_() for t in (x, b, r)]
        truth = _toy_reference(leaves[0], w, leaves[1], leaves[2], 2.0)
        truth.backward(torch.arange(12.0).view(4, 3))
        assert torch.equal(y, truth) and w.grad is None
        assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in zip((x, b, r), leaves))
    printed = capsys.readouterr().err
    assert printed == ("deit_fast: toy_axpy: could not compile axpy_kernel here. Backend 'reference' serves toy_axpy "
                       "instead.\n")


@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_kernel_that_was_asked_for_and_does_not_compile(toy: NativeOp, failing: Callable[[str], None],
                                                          half: str) -> None:
    """By argument or by context: it raises, in backward too, and from then on before any kernel is tried."""
    for name, context in (("cpu", nullcontext()), (None, use_backend("cpu"))):
        failing(half)
        with context:
            x, w, b, r = tensors()
            with pytest.raises(BackendError, match="could not compile axpy_kernel here"):
                toy(name, x, w, b, r, 2.0).sum().backward()
    with pytest.raises(BackendError, match="cannot serve this call: could not compile"):
        toy("cpu", *tensors(), 2.0)
