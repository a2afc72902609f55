"""Every backend of every op against the oracle, row by row of `cases.py`: values, gradients, compiled code, opcheck.

Test ids read op-backend-dtype-shape-mode. A cell that cannot run here is skipped with the words of the op's own `why_not`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CASES, VARIANTS, Case, Variant
from deit_fast import backend as selection
from deit_fast import ops, reference
from needs import REQUIRED, skip_or_fail
from oracle import assert_within_budget

FP32 = VARIANTS[0]


def cells(compiled: bool = False) -> list:
    """(case, variant, backend) for every native backend that an op has; `reference` only where it is compiled.

    A backend that cannot run on this machine has one cell for each op, which says so by its skip.
    """
    found, absent = [], set()
    for case in CASES:
        op = selection.OPS[case.op]
        for name in ("reference", *op.offers) if compiled else op.offers:
            variants = VARIANTS[:1] if name == "reference" else VARIANTS
            if op.why_not_here(name) and name not in REQUIRED:
                variants = () if (case.op, name) in absent else VARIANTS[:1]
                absent.add((case.op, name))
            elif compiled and not case.compiled:
                continue
            mode = "compile" if compiled else "eager"
            found += [pytest.param(case, variant, name, id=f"{case.op}-{name}-{variant.name}-{case.name}-{mode}")
                      for variant in variants]
    return found


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()}


def run(function, case: Case, inputs: dict[str, Any], cotangents: list[Tensor] | None = None):
    """(outputs, gradients of case.grads, cotangents): one forward and, where there are gradients to take, one backward."""
    inputs = {name: value.detach().clone().requires_grad_() if name in case.grads else value
              for name, value in inputs.items()}
    outputs = function(**inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not case.grads:
        return outputs, [], []
    if cotangents is None:
        generator = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]
    cotangents = [c.to(y.dtype) for c, y in zip(cotangents, outputs)]
    leaves = [inputs[name] for name in case.grads]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, cotangents)), cotangents


def check(case: Case, variant: Variant, backend: str, compiled: bool) -> None:
    """One cell: the op under `backend` against the oracle."""
    device = device_of(backend)
    inputs = case.inputs(variant, device)
    rounded = inputs
    if variant.autocast and case.op != "distillation_loss":  # what the op sees, once cast; the loss keeps its fp32 logits
        rounded = case.inputs(Variant("bf16mixed", torch.bfloat16, torch.float32), device)
    op = getattr(ops, case.op)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=variant.autocast):
        try:
            outputs, grads, cotangents = run(lambda **kw: op(**kw, backend=backend), case, inputs)
        except selection.BackendError as error:
            skip_or_fail(backend, str(error))
        if compiled:  # after the eager run: Dynamo would wrap the BackendError in an error of its own
            call = torch.compile(op, fullgraph=True)
            outputs, grads, _ = run(lambda **kw: call(**kw, backend=backend), case, inputs, cotangents)
    plain = getattr(reference, case.op)
    base_outputs, base_grads, _ = run(plain, case, rounded, cotangents)
    true_outputs, true_grads, _ = run(plain, case, in_double(rounded), cotangents)
    for i, triple in enumerate(zip(outputs, true_outputs, base_outputs, strict=True)):
        assert_within_budget(f"output {i}", *triple)
    for name, grad, truth, base in zip(case.grads, grads, true_grads, base_grads, strict=True):
        assert_within_budget(f"d{name}", grad.to(base.dtype), truth, base)


@pytest.mark.parametrize(("case", "variant", "backend"), cells())
def test_eager(case: Case, variant: Variant, backend: str) -> None:
    check(case, variant, backend, compiled=False)


@pytest.mark.parametrize(("case", "variant", "backend"), cells(compiled=True))
def test_compiled(case: Case, variant: Variant, backend: str) -> None:
    check(case, variant, backend, compiled=True)


class _Recorder(TorchDispatchMode):
    """Keeps every call of one of our registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deit_fast":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("case", "variant", "backend"), [cell for cell in cells() if not cell.values[1].autocast])
def test_opcheck(case: Case, variant: Variant, backend: str) -> None:
    """Schema, fake and dynamic-shape checks of each registered operator that the op calls, forward and backward."""
    with _Recorder() as recorder:
        try:
            run(lambda **kw: getattr(ops, case.op)(**kw, backend=backend), case, case.inputs(variant, device_of(backend)))
        except selection.BackendError as error:
            skip_or_fail(backend, str(error))
    assert recorder.calls, f"{case.op} called no registered operator under {backend}"
    for func, args, kwargs in recorder.calls:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, args, kwargs)
