"""What is particular to the C++ kernels: any number of threads, every instruction set, masks bit by bit.

Values and gradients against the oracle are test_parity.py's; here it runs again for each instruction set that the
processor has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deit_fast import ops, reference
from deit_fast.backend import BackendError
from deit_fast.kernels import cpu
from deit_fast.kernels.cpu import launch
from deit_fast.reference.philox import keep_mask
from needs import needs_cpu

pytestmark = needs_cpu
TESTS = Path(__file__).parent
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


def in_a_process_forced_to(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python *arguments` with DEIT_FAST_CPU_ISA=isa: one module per process is loaded."""
    env = {**os.environ, "DEIT_FAST_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


PROBE = "from deit_fast.kernels import cpu; print(cpu.isa, cpu.why_not() or '', sep='|')"


@pytest.mark.parametrize("isa", [isa for isa in cpu.ISAS if isa != cpu.isa])
def test_every_instruction_set(isa: str) -> None:
    """The parity table, forward and backward, under every instruction set that the processor has beside the chosen one."""
    forced, reason = in_a_process_forced_to(isa, "-c", PROBE).stdout.strip().split("|")
    if reason:
        pytest.skip(reason)
    assert forced == isa
    names = " or ".join(f"{op}-cpu-{variant}" for op in OPS for variant in ("fp32", "bf16mixed"))
    result = in_a_process_forced_to(isa, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k",
                                    f"({names}) and test_eager", str(TESTS / "test_parity.py"))
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"CPU kernels: {isa}," in result.stdout


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    """Nothing runs in its place: the op steps down to reference, and asked for by name it says why."""
    forced, reason = in_a_process_forced_to("sse9", "-c", PROBE).stdout.strip().split("|")
    assert forced == "None" and reason.startswith("DEIT_FAST_CPU_ISA=sse9 cannot be served: usable here: ")
    assert reason.endswith("generic")


@pytest.mark.parametrize("fast_bf16", [False, True])
def test_the_automatic_order_leaves_wide_layers_to_fast_products(monkeypatch: pytest.MonkeyPatch,
                                                                 fast_bf16: bool) -> None:
    """Wider than 128 in training, than 256 in inference; bf16 products are fast where the processor has them."""
    monkeypatch.setattr(launch, "FAST_BF16", fast_bf16)
    native = ("cpu", "triton")
    for dtype, fast in ((torch.float32, True), (torch.bfloat16, fast_bf16)):
        narrow, middle, wide = (torch.zeros(2, C, dtype=dtype) for C in (64, 192, 384))
        left = () if fast else native
        assert [launch.order(x) for x in (narrow, middle, wide)] == [native, left, left]
        assert launch.order(wide, 0.0, torch.tensor(1)) == left and launch.order(wide, 0.1, torch.tensor(1)) == native
        with torch.no_grad():
            assert [launch.order(x) for x in (narrow, middle, wide)] == [native, native, left]


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
