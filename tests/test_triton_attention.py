"""Attention's forward by groups of heads: how many heads and programs and, in the interpreter, what they compute."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from deit_fast.kernels.triton import attention  # noqa: E402
from deit_fast.kernels.triton.common import cdiv  # noqa: E402
from test_triton_cubins import NANO, cubins  # noqa: E402
from test_triton_cubins import pytestmark as compiles  # noqa: E402
from test_triton_interpreted import interpreted  # noqa: E402
from test_triton_interpreted import pytestmark as interprets  # noqa: E402


def test_heads_together() -> None:
    """A group divides the heads, fits in 64 bytes of a row, and is the largest that does; else one."""
    found = {(H, D, itemsize): attention.heads_together(66, H, D, itemsize)
             for H in range(1, 33) for D in (1, 5, 8, 16, 20, 24, 32, 33, 64, 256) for itemsize in (2, 4)}
    for (H, D, itemsize), heads in found.items():
        assert heads in (1, 2, 4, 8) and H % heads == 0 and (heads == 1 or heads * D * itemsize <= 64)
        assert heads == 8 or H % (2 * heads) or 2 * heads * D * itemsize > 64
    assert [found[key] for key in ((8, 8, 2), (12, 16, 2), (6, 24, 2), (3, 64, 2), (3, 8, 2), (8, 8, 4))] == [
        4, 2, 1, 1, 1, 2]
    assert [attention.heads_together(257, 8, D, 2) for D in (8, 12, 16, 24, 64)] == [4, 2, 1, 1, 1]


def test_shares() -> None:
    """Programs of a group: one for each block where there is room, one for all where images are many."""
    assert attention.shares(64, 5, 8) == 5 and attention.shares(1024, 5, 8) == 1 and attention.shares(0, 5, 8) == 5
    for groups in (1, 50, 64, 100, 132, 264, 1000):
        for blocks in (1, 2, 5, 13):
            for num_warps in (1, 2, 4, 8):
                found = attention.shares(groups, blocks, num_warps)
                assert 1 <= found <= blocks and (found == 1 or groups * num_warps * found <= attention.WARPS)
                assert cdiv(blocks, found) * (found - 1) < blocks, "a program has nothing to do"


@compiles
def test_report_size_on_hopper() -> None:
    """A program takes four heads of an image and spills nothing; four fit a multiprocessor; a small batch has more."""
    for batch, programs in ((1024, 2048), (64, 640)):
        qkv, heads, *_ = cubins.block_calls(NANO, "bf16", batch)["attention"]
        launch, _ = cubins.launches_of("attention", (qkv, heads, None, 0.0, None))
        assert launch.grid == (programs,) and launch.arguments["HEADS"] == launch.arguments["num_warps"] == 4
    usage = cubins.compile_launch(launch, 90)
    assert usage.stack == 0 and usage.registers * 32 * 4 <= 65536 / 4 and usage.shared <= cubins.SHARED_LIMIT[90] / 4


@interprets
def test_interpreted() -> None:
    """What `triton_attention_checks.py` asserts."""
    result = interpreted("tests/triton_attention_checks.py")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
