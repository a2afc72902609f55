"""Random calls of every CPU op: right numbers or a named error, and never a crash.

`DEIT_FAST_EXAMPLES` is how many: 10,000 in scripts/slow_tests.sh, a few hundred, always the same, otherwise. The bound
on the numbers is coarse, since it has to hold for any shape: test_parity.py has the fine one.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deit_fast import ops, reference, use_backend
from deit_fast.backend import BackendError
from needs import needs_cpu
from random_calls import Call, block_calls, cotangent_like, spoilt_calls, valid_calls

pytestmark = needs_cpu
EXAMPLES = os.environ.get("DEIT_FAST_EXAMPLES")


def share(part: float) -> settings:
    """Settings for this part of all examples."""
    return settings(max_examples=max(1, round(part * int(EXAMPLES or 300))), deadline=None, database=None,
                    derandomize=EXAMPLES is None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(function, call: Call, **keywords: object) -> dict[str, Tensor]:
    """The output and the gradients of call.needs, by name."""
    leaves = {name: call.arguments[name].detach().requires_grad_() for name in call.needs}
    out = function(**{**call.arguments, **leaves}, **keywords)
    assert out.requires_grad == bool(leaves)
    if not leaves:
        return {"out": out}
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent_like(out, call.cotangent))
    return {"out": out.detach(), **dict(zip(leaves, grads))}


def served(call: Call) -> dict[str, Tensor]:
    """What `cpu` returns, with the promises that hold for every call."""
    torch.set_num_threads(call.threads)
    before = {name: call.arguments[name].clone() for name in call.tensors()}
    results = run(getattr(ops, call.op), call, backend="cpu")
    assert results["out"].is_contiguous()
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), call.arguments[name].nan_to_num()), f"{name} was written to"
    return results


@share(0.4)
@given(valid_calls())
def test_random_calls(call: Call) -> None:
    """Right numbers, forward and backward, for whatever the reference accepts."""
    actual = served(call)
    double = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
              for name, value in call.arguments.items()}
    truth = run(getattr(reference, call.op), Call(call.op, double, call.needs, call.cotangent))
    x = next(iter(call.arguments.values()))  # x or qkv: the activations come first
    unit = 3e-5 if x.dtype == torch.float32 else 3e-2
    scale = 1 / (1 - call.arguments.get("dropout_p", 0.0))  # of what dropout keeps
    sums = scale * (1 + (x.numel() / x.shape[-1]) ** 0.5)  # a sum over the rows may cancel
    if x.shape[-1] < 4 or call.arguments.get("eps", 1) < 1e-6:
        unit *= 100  # LayerNorm of few nearly equal values amplifies rounding
    for name, value in actual.items():
        assert value.shape == truth[name].shape
        if value.numel():
            error, size = (value.double() - truth[name]).abs().max().item(), truth[name].abs().max().item()
            assert error <= unit * (size + sums), f"{name}: {error} of {size}"


@share(0.1)
@given(block_calls())
def test_random_blocks(call: Call) -> None:
    """The bits of the four ops, forward and backward; an encoder has those of its blocks."""
    actual = served(call)
    with use_backend("cpu", encoder_block="reference"):
        expected = run(ops.encoder_block, call)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
    call = replace(call, needs=(), arguments={name: value for name, value in call.arguments.items()
                                              if "dropout" not in name and name != "seed" and "scale" not in name})
    once = run(ops.encoder_block, call, backend="cpu")["out"]
    twice = run(ops.encoder_block, call.with_argument("x", once), backend="cpu")["out"]
    x, *rest = call.arguments.values()
    encoded = ops.encoder(x, [rest[:12]] * 2, *rest[12:], backend="cpu")
    torch.testing.assert_close(encoded, twice, rtol=0, atol=0, equal_nan=True)


@share(0.2)
@given(valid_calls(), st.data())
def test_nan_and_infinity_are_never_lost(call: Call, data: st.DataObject) -> None:
    """One element spoilt: whatever is not finite in the reference is not finite here, in output and gradients.

    And nothing else, except where dropout drops a NaN: the reference selects a zero there, a product with 0 (PyTorch's
    own dropout, and ours) leaves NaN.
    Attention is held against a softmax written out, which `reference` takes with seeded dropout (the rate drops nothing
    here): PyTorch's fused kernels make zeros of a row of NaN or of -inf.
    """
    if call.op == "attention":
        call = replace(call, arguments={**call.arguments, "dropout_p": 1e-12, "seed": torch.tensor(0)})
    names = [name for name in call.tensors() if name != "seed" and call.arguments[name].numel()]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    value = call.arguments[name].contiguous().clone()
    at = data.draw(st.integers(0, value.numel() - 1))
    value.view(-1)[at] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    call = call.with_argument(name, value)
    dropped = call.op != "attention" and call.arguments.get("dropout_p", 0.0) > 0.0
    actual, expected = served(call), run(getattr(reference, call.op), call)
    for name, value in actual.items():
        ours, theirs = value.isfinite(), expected[name].isfinite()
        assert torch.equal(ours & theirs, ours) if dropped else torch.equal(ours, theirs), name


@share(0.3)
@given(spoilt_calls())
def test_random_invalid_calls(drawn: tuple[Call, str]) -> None:
    """One argument spoilt: an error that names the op, never a crash or a silent answer."""
    call, _what = drawn
    with pytest.raises((ValueError, TypeError, BackendError), match=f"^{call.op}: "):
        getattr(ops, call.op)(**{"backend": "cpu", **call.arguments})
