"""What is particular to the C++ kernels: any number of threads, every instruction set, masks bit by bit, arbitrary calls.

Values and gradients against the oracle are test_parity.py's; here it runs again for each instruction set that the
processor has. `DEIT_FAST_EXAMPLES=10000` makes the random calls as many as that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deit_fast import ops, reference
from deit_fast.backend import BackendError
from deit_fast.kernels import cpu
from deit_fast.reference.philox import keep_mask

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
TESTS = Path(__file__).parent
EXAMPLES = int(os.environ.get("DEIT_FAST_EXAMPLES", "150"))
OPS = ("layernorm_linear", "linear_residual", "layernorm_mlp")


def arguments(op: str, lead: tuple[int, ...], C: int, F: int, activation: torch.dtype = torch.float32,
              parameter: torch.dtype = torch.float32, bias: bool = True, **residual: object) -> dict:
    """Keyword arguments for one of OPS: activations (*lead, C), F features; `residual` holds dropout and drop-path."""
    x = torch.randn(*lead, C).to(activation)

    def p(*shape: int, optional: bool = False) -> Tensor | None:
        return None if optional and not bias else (torch.randn(shape) * 0.2).to(parameter)

    norm = {"ln_weight": p(C), "ln_bias": p(C, optional=True)}
    if op == "layernorm_linear":
        return {"x": x, **norm, "weight": p(F, C), "bias": p(F, optional=True)}
    if op == "linear_residual":
        return {"x": x, "weight": p(F, C), "bias": p(F, optional=True), "residual": torch.randn(*lead, F).to(activation),
                **residual}
    return {"x": x, **norm, "fc1_weight": p(F, C), "fc1_bias": p(F, optional=True), "fc2_weight": p(C, F),
            "fc2_bias": p(C, optional=True), **residual}


def run(function, call: dict, **keywords: object) -> dict[str, Tensor]:
    """The output and the gradient of every floating-point argument, by name, for a fixed cotangent."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in call.items()
              if isinstance(value, Tensor) and value.is_floating_point() and name != "row_scale"}
    out = function(**{**call, **leaves}, **keywords)
    cotangent = torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape).to(out.dtype)  # the same number in all dtypes
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves, grads))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads_gives_the_same_bits(op: str, dtype: torch.dtype) -> None:
    """1100 rows are several chunks of partial sums; 3 and 5 threads share them unevenly."""
    drop = {"dropout_p": 0.1, "seed": torch.tensor(5), "row_scale": torch.rand(11)} if op != "layernorm_linear" else {}
    call = arguments(op, (11, 100), 64, 72, dtype, **drop)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(run(getattr(ops, op), call, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("isa", [isa for isa in cpu.ISAS if isa != cpu.isa])
def test_every_instruction_set(isa: str) -> None:
    """The parity table, forward and backward, in a process of its own: one module per process is loaded."""
    env = {**os.environ, "DEIT_FAST_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    probe = subprocess.run([sys.executable, "-c", "from deit_fast.kernels import cpu; print(cpu.why_not() or '')"], env=env,
                           capture_output=True, text=True, check=True)
    if probe.stdout.strip():
        pytest.skip(probe.stdout.strip())
    names = " or ".join(f"{op}-cpu-{variant}" for op in OPS for variant in ("fp32", "bf16mixed"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "test_parity.py"), "-k", f"({names}) and test_eager"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 1e-12])
@pytest.mark.parametrize("features", [1, 3, 5, 64, 66, 130])
def test_masks_are_the_reference_s(features: int, p: float) -> None:
    """With weight 0, bias 1 and residual 0 the output is the mask, scaled; odd widths start rows within a Philox block."""
    seed = torch.tensor(-3)
    out = ops.linear_residual(torch.zeros(7, 4), torch.zeros(features, 4), torch.ones(features), torch.zeros(7, features),
                              p, seed, backend="cpu")
    kept = keep_mask((7, features), p, seed, reference.block.SITE_LINEAR_RESIDUAL)
    assert torch.equal(out != 0, kept)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))


@pytest.mark.parametrize(("change", "words"), [
    ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "float64 activations have no C"),
    ({"dropout_p": 0.5}, "dropout without a seed"),
    ({"weight": torch.zeros(0, 8), "residual": torch.zeros(2, 0), "bias": None}, "no features"),
])
def test_what_is_refused(change: dict, words: str) -> None:
    call = {**arguments("linear_residual", (2,), 8, 4), **change}
    if call["x"].dtype == torch.float64:
        call = {name: value.double() for name, value in call.items()}
    with pytest.raises(BackendError, match=words):
        ops.linear_residual(**call, backend="cpu")


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict]:
    """An op and a valid call of it: odd sizes, no rows, mixed dtypes, left-out biases, dropout, drop-path, strides."""
    op = draw(st.sampled_from(OPS))
    lead = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    if draw(st.booleans()):
        lead = (*lead[:-1], draw(st.integers(90, 300)))
    C, F = draw(st.integers(1, 140)), draw(st.integers(1, 300))
    activation, parameter = draw(st.sampled_from([(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                  (torch.bfloat16, torch.float32)]))
    residual: dict = {}
    if op != "layernorm_linear" and draw(st.booleans()):
        residual = {"dropout_p": draw(st.floats(0.01, 0.9)), "seed": torch.tensor(draw(st.integers(-2**63, 2**63 - 1)))}
    if op != "layernorm_linear" and draw(st.booleans()):
        residual["row_scale"] = torch.rand(lead[0])
    torch.manual_seed(draw(st.integers(0, 1000)))
    call = arguments(op, lead, C, F, activation, parameter, draw(st.booleans()), **residual)
    if draw(st.booleans()):  # every second element of a wider tensor
        call["x"] = torch.stack([call["x"], call["x"]], dim=-1)[..., 0]
    return op, call


RELAXED = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@RELAXED
@given(calls())
def test_random_calls(drawn: tuple[str, dict]) -> None:
    """Right numbers, forward and backward, for whatever the reference accepts (a coarse bound: test_parity has the fine one)."""
    op, call = drawn
    if call["x"].dim() < 2:
        call.pop("row_scale", None)
    actual = run(getattr(ops, op), call, backend="cpu")
    double = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
              for name, value in call.items()}
    truth = run(getattr(reference, op), double)
    unit = 3e-5 if call["x"].dtype == torch.float32 else 3e-2
    for name, value in actual.items():
        if value.numel():
            error, size = (value.double() - truth[name]).abs().max().item(), truth[name].abs().max().item()
            narrow = call["x"].shape[-1] < 4  # LayerNorm of few nearly equal values amplifies rounding without bound
            rows = call["x"].numel() / call["x"].shape[-1]  # a sum over them may cancel
            assert error <= unit * (size + 1 + rows**0.5) * (100 if narrow else 1), f"{name}: {error} of {size}"


@RELAXED
@given(calls(), st.data())
def test_random_invalid_calls(drawn: tuple[str, dict], data: st.DataObject) -> None:
    """One argument spoilt: a named error, never a crash or a silent answer."""
    op, call = drawn
    tensors = sorted(name for name, value in call.items() if isinstance(value, Tensor) and name not in ("seed", "row_scale"))
    name = data.draw(st.sampled_from(tensors))
    value = call[name]
    spoilt = data.draw(st.sampled_from(["longer", "deeper", "integer", "list", "half", "meta"]))
    call[name] = {
        "longer": lambda: torch.cat([value, value.narrow(-1, 0, 1)], dim=-1),
        "deeper": lambda: value[None, None, None, None],
        "integer": lambda: value.long(),
        "list": lambda: value.tolist(),
        "half": lambda: value.half(),
        "meta": lambda: value.to("meta"),
    }[spoilt]()
    if name == "x" and spoilt == "deeper" and op == "layernorm_linear" or name == "x" and op == "layernorm_mlp" and spoilt == "deeper":
        return  # more leading dimensions are fine
    with pytest.raises((ValueError, TypeError, BackendError)):
        getattr(ops, op)(**call, backend="cpu")
