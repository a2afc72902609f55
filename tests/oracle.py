"""The oracle: how far a result may lie from the truth, derived from data, with no constant per op.

truth     the reference in fp64 on the inputs as rounded to the tested dtype
baseline  the reference in the tested dtype: the error that plain PyTorch makes on the same inputs

A result passes when its maximum error is at most 2 (baseline's + eps max|truth|) and its RMS error at most
2 baseline's + eps RMS(truth), eps being the unit of the result's dtype. The RMS catches small systematic errors that a
maximum hides in 16-bit dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(name: str, actual: Tensor, truth: Tensor, baseline: Tensor) -> None:
    """Raises AssertionError naming the tensor when `actual` is further from `truth` than the budget."""
    assert actual.shape == baseline.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(baseline.shape)}"
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, expected {baseline.dtype}"
    if actual.numel() == 0:
        return
    truth = truth.double().to(actual.device)
    assert torch.isfinite(actual.double()[torch.isfinite(baseline.double())]).all(), f"{name}: not finite"
    (worst, rms), (base_worst, base_rms) = errors(actual, truth), errors(baseline, truth)
    eps = torch.finfo(actual.dtype).eps
    limit = 2 * (base_worst + eps * truth.abs().max().item())
    rms_limit = 2 * base_rms + eps * truth.square().mean().sqrt().item()
    assert worst <= limit, f"{name}: max error {worst:.3e} > {limit:.3e} (baseline's {base_worst:.3e})"
    assert rms <= rms_limit, f"{name}: RMS error {rms:.3e} > {rms_limit:.3e} (baseline's {base_rms:.3e})"


def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """(maximum, RMS) of |result - truth|."""
    difference = result.double() - truth.double().to(result.device)
    return difference.abs().max().item(), difference.square().mean().sqrt().item()
