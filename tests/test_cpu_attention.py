"""The C++ attention beyond the parity table: its dropout mask, threads, instruction sets, long rows, and odd calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deit_fast import ops, reference
from deit_fast.backend import BackendError
from deit_fast.kernels import cpu
from deit_fast.reference.philox import keep_mask
from needs import needs_cpu
from oracle import assert_within_budget

pytestmark = needs_cpu

SEED = torch.tensor(-0x1234567_89ABCDEF)


def forward_backward(qkv: torch.Tensor, num_heads: int, backend: str, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, dqkv) for a fixed gradient of the output."""
    qkv = qkv.detach().clone().requires_grad_()
    out = ops.attention(qkv, num_heads, backend=backend, **settings)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def compare(qkv: torch.Tensor, num_heads: int, **settings) -> None:
    """The cpu backend within the oracle's budget, forward and backward."""
    results = forward_backward(qkv, num_heads, "cpu", **settings)
    baseline = forward_backward(qkv, num_heads, "reference", **settings)
    truth = forward_backward(qkv.double(), num_heads, "reference", **settings)
    for name, *triple in zip(("out", "dqkv"), results, truth, baseline):
        assert_within_budget(name, *triple)


@pytest.mark.parametrize(("B", "N", "H", "D"),
                         [(2, 66, 8, 8), (1, 65, 3, 8), (1, 7, 2, 5), (2, 67, 1, 64), (1, 130, 2, 8)])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_mask_is_the_references(B: int, N: int, H: int, D: int, p: float) -> None:
    """With all logits equal and V one-hot in the key, an output element is a kept weight or an exact zero."""
    expected = keep_mask((B, H, N, N), p, SEED, 0)
    for first in range(0, N, D):  # D keys at a time are visible through V
        qkv = torch.zeros(B, N, 3, H, D)
        width = min(D, N - first)
        qkv[:, first:first + width, 2, :, :width] = torch.eye(width).unsqueeze(1)
        out = ops.attention(qkv.flatten(2), H, dropout_p=p, seed=SEED, backend="cpu").view(B, N, H, D)
        kept = out[..., :width].permute(0, 2, 1, 3) != 0  # (B, H, N, width)
        assert torch.equal(kept, expected[..., first:first + width])


def test_backward_draws_the_same_mask() -> None:
    """dV of equal logits is the mask's column sums: exact in multiples of the kept weight."""
    B, N, H, D, p = 1, 66, 2, 8, 0.5
    qkv = torch.zeros(B, N, 3 * H * D, requires_grad=True)
    out = ops.attention(qkv, H, dropout_p=p, seed=SEED, backend="cpu")
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    counts = keep_mask((B, H, N, N), p, SEED, 0).sum(dim=2)  # (B, H, keys)
    drawn = grad.view(B, N, 3, H, D)[:, :, 2, :, 0].transpose(1, 2) * (1 - p) * N
    assert torch.equal(drawn.round().long(), counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "H", "D"), [(66, 8, 8), (67, 3, 64)])
def test_thread_count_does_not_change_a_bit(N: int, H: int, D: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(3, N, 3 * H * D).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(forward_backward(qkv, H, "cpu", dropout_p=0.1, seed=SEED))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("N", [2, 15, 16, 17, 63, 64, 65, 66, 67, 68, 69, 80, 81, 128, 129, 131, 133, 1023])
@pytest.mark.parametrize("D", [8, 20])
def test_every_block_boundary(N: int, D: int) -> None:
    compare(torch.randn(1, N, 3 * 2 * D), 2)


@pytest.mark.parametrize("D", [1, 3, 4, 8, 16, 17, 32, 63, 64, 65, 80, 128, 200])
def test_every_head_dim(D: int) -> None:
    compare(torch.randn(2, 19, 3 * 2 * D), 2, dropout_p=0.2, seed=SEED)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3, 4.0])
def test_scale(scale: float) -> None:
    compare(torch.randn(2, 66, 192), 8, scale=scale)


@pytest.mark.parametrize("magnitude", [1e-20, 30.0, 1e4])
def test_extreme_logits_stay_finite(magnitude: float) -> None:
    for result in forward_backward(torch.randn(1, 66, 192) * magnitude, 8, "cpu"):
        assert torch.isfinite(result).all()


def test_nan_and_infinity_reach_the_output_like_the_references() -> None:
    qkv = torch.randn(2, 66, 3, 8, 8)
    qkv[0, 3, 0, 2, 1] = float("nan")  # one query of one head: only its own row is lost
    qkv[1, 5, 1, 4, 0] = float("inf")  # one key: every row of the head
    qkv = qkv.flatten(2)
    ours, theirs = ops.attention(qkv, 8, backend="cpu"), reference.attention(qkv, 8)
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))


@pytest.mark.parametrize("N", [5, 66, 198])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_gradients_of_a_softmax_written_out(N: int, part: int, value: float) -> None:
    """One spoilt q, k or v; seeded dropout, at a rate that drops nothing, makes the reference write its softmax out."""
    qkv = torch.randn(1, N, 3, 2, 8)
    qkv[0, N // 2, part, 1, 3] = value
    settings = {"dropout_p": 1e-12, "seed": SEED}
    results = [forward_backward(qkv.flatten(2), 2, backend, **settings) for backend in ("cpu", "reference")]
    for ours, theirs in zip(*results):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_what_it_does_not_serve() -> None:
    qkv = torch.randn(1, 5, 24)
    for bad, settings, words in ((qkv.half(), {}, "float16 activations have no C"),
                                 (qkv.double(), {}, "float64 activations have no C"),
                                 (qkv, {"dropout_p": 0.1}, "dropout without a seed")):
        with pytest.raises(BackendError, match=words):
            ops.attention(bad, 1, backend="cpu", **settings)


@pytest.mark.parametrize("isa", [isa for isa in cpu.ISAS if isa != cpu.isa])
def test_every_instruction_set(isa: str) -> None:
    """The parity rows and this file's own tests under a forced instruction set, in a process of its own."""
    if cpu._load(isa)[0] is None:
        pytest.skip(cpu._load(isa)[2])
    if os.environ.get("DEIT_FAST_CPU_ISA"):
        pytest.skip("already inside a forced instruction set")
    folder = Path(__file__).parent
    names = "(attention-cpu and eager) or mask or block_boundary or head_dim or extreme or nan"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", names, str(folder / "test_parity.py"), __file__]
    run = subprocess.run(command, cwd=folder.parent, text=True, capture_output=True,
                         env={**os.environ, "DEIT_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"CPU kernels: {isa}" in run.stdout
