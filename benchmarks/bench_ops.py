"""Speed and error of every block op at the presets' shapes, per backend and dtype, beside the reference's own.

Every row carries in `extra_info` the maximum and the RMS error of its output against fp64, and the reference's in the same
dtype: a backend that is faster because it is sloppier shows here. Rates are of the forward pass, or of forward and
backward together.
"""

from __future__ import annotations

import pytest
import torch

from cases import BLOCK, Case, Maker, Variant, block_inputs
from deit_fast import backend as selection
from deit_fast import ops, reference
from needs import skip_or_fail
from oracle import errors
from test_parity import device_of, in_double, run

VARIANTS = (Variant("fp32", torch.float32, torch.float32), Variant("bf16mixed", torch.bfloat16, torch.float32))


def _block_cases(shape: str, B: int, N: int, C: int, H: int, F: int) -> list[Case]:
    """A block and its four ops at one preset's size, with the dropout of training where the preset has it."""

    def layernorm(m: Maker) -> dict:
        return {"ln_weight": m.parameter(C, offset=1.0), "ln_bias": m.parameter(C)}

    def qkv(m: Maker) -> dict:
        return {"x": m.normal(B, N, C), **layernorm(m), "weight": m.parameter(3 * C, C, scale=C**-0.5),
                "bias": m.parameter(3 * C)}

    def proj(m: Maker) -> dict:
        return {"x": m.normal(B, N, C), "weight": m.parameter(C, C, scale=C**-0.5), "bias": m.parameter(C),
                "residual": m.normal(B, N, C)}

    def mlp(m: Maker) -> dict:
        return {"x": m.normal(B, N, C), **layernorm(m), "fc1_weight": m.parameter(F, C, scale=C**-0.5),
                "fc1_bias": m.parameter(F), "fc2_weight": m.parameter(C, F, scale=F**-0.5), "fc2_bias": m.parameter(C)}

    return [
        Case("layernorm_linear", shape, qkv, ("x", "ln_weight", "ln_bias", "weight", "bias")),
        Case("attention", shape, lambda m: {"qkv": m.normal(B, N, 3 * C), "num_heads": H}, ("qkv",)),
        Case("linear_residual", shape, proj, ("x", "weight", "bias", "residual")),
        Case("layernorm_mlp", shape, mlp,
             ("x", "ln_weight", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")),
        Case("encoder_block", shape, lambda m: block_inputs(m, B, N, C, H, F), BLOCK),
    ]


CASES = [*_block_cases("nano64x66", 64, 66, 64, 8, 256), *_block_cases("tiny4x198", 4, 198, 192, 3, 768)]


def cells() -> list:
    return [pytest.param(case, variant, backend, training,
                         id=f"{case.op}-{backend}-{variant.name}-{case.name}-{'fwdbwd' if training else 'fwd'}")
            for case in CASES for training in (False, True) for variant in VARIANTS for backend in selection.BACKENDS
            if selection.OPS[case.op].why_not_here(backend) is None]


@pytest.mark.parametrize(("case", "variant", "backend", "training"), cells())
def test_op(benchmark, case: Case, variant: Variant, backend: str, training: bool) -> None:
    device = device_of(backend)
    inputs = case.inputs(variant, device)
    op = getattr(ops, case.op)
    try:
        outputs, _, cotangents = run(lambda **kw: op(**kw, backend=backend), case, inputs)
    except selection.BackendError as error:
        skip_or_fail(backend, str(error))
    plain = getattr(reference, case.op)
    with torch.no_grad():
        truth, base = plain(**in_double(inputs)), plain(**inputs)
    benchmark.group = f"{case.op} {case.name} {variant.name} {'forward + backward' if training else 'forward'}"
    names = ("max_error", "rms_error", "reference_max_error", "reference_rms_error")
    benchmark.extra_info.update(zip(names, (*errors(outputs[0], truth), *errors(base, truth))))

    def forward() -> None:
        with torch.no_grad():
            op(**inputs, backend=backend)
        if device == "cuda":
            torch.cuda.synchronize()

    def forward_backward() -> None:
        run(lambda **kw: op(**kw, backend=backend), case, inputs, cotangents)
        if device == "cuda":
            torch.cuda.synchronize()

    work = forward_backward if training else forward
    benchmark.pedantic(work, rounds=9, warmup_rounds=2)
