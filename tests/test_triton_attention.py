"""Attention's tiles: heads and programs, whether they hold K and V, backward's warps; and what they compute."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch  # noqa: E402

from deit_fast.kernels.triton import attention  # noqa: E402
from deit_fast.kernels.triton.common import Launch, cdiv  # noqa: E402
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


def tokens(batch: int, N: int, H: int, D: int, dropout_p: float = 0.0, dtype: torch.dtype = torch.bfloat16,
           arch: int = 90) -> Launch:
    """The forward launch of these sequences."""
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
    qkv = torch.empty((batch, N, 3 * H * D), dtype=dtype, device="meta")
    return cubins.launches_of("attention", (qkv, H, None, dropout_p, seed), save=False, arch=arch)[0]


def backward(batch: int, N: int, arch: int = 90) -> Launch:
    """The backward launch of 8 heads of 8 in bf16."""
    qkv = torch.empty((batch, N, 192), dtype=torch.bfloat16, device="meta")
    return cubins.launches_of("attention", (qkv, 8, None, 0.0, None), arch=arch)[1]


def test_holds() -> None:
    """Up to 256 tokens in 16 bits are held by a program of several query blocks; a single block of keys always."""
    for N, H, D in ((66, 8, 8), (66, 3, 64), (97, 3, 64), (128, 3, 64), (198, 3, 64), (256, 3, 64), (198, 12, 16),
                    (198, 8, 8), (256, 6, 32)):
        assert tokens(1024, N, H, D).arguments["HELD"], (N, H, D)
    assert tokens(64, 66, 8, 8, 0.1, torch.float32).arguments["HELD"]
    few, more = tokens(64, 198, 3, 64), tokens(64, 198, 6, 64)
    assert few.grid == more.grid == (768,) and not few.arguments["HELD"] and more.arguments["HELD"]
    for launch in (tokens(1024, 257, 3, 64), tokens(1024, 256, 3, 80), tokens(1024, 198, 3, 64, 0.1),
                   tokens(1024, 198, 3, 64, dtype=torch.float32)):
        assert not launch.arguments["HELD"]


@compiles
@pytest.mark.parametrize(("N", "D", "arch"), [(198, 64, 90), (256, 64, 80), (198, 8, 90)])
def test_held_keys_fit(N: int, D: int, arch: int) -> None:
    """K and V are read before the walk over query blocks, nothing spills, and two programs fit a multiprocessor."""
    launch = tokens(1024, N, 8, D, arch=arch)
    usage = cubins.compile_launch(launch, arch)
    assert usage.stack == 0 and usage.registers * 32 * launch.arguments["num_warps"] <= 65536 / 2
    assert usage.shared <= cubins.SHARED_LIMIT[arch] / 2
    before, walk = cubins.compiled_kernel(launch, arch).asm["ttir"].split("scf.for")
    assert before.count(" tt.load ") == 8 and walk.count(" tt.load ") == 1


@compiles
@pytest.mark.parametrize("N", [1, 15, 17])
def test_shorter_than_a_block_of_keys(N: int) -> None:
    """Of one masked tail, or of 16 keys and a tail, nothing spills."""
    assert cubins.compile_launch(tokens(64, N, 3, 64), 90).stack == 0
    assert cubins.compile_launch(backward(1024, N), 90).stack == 0


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_backward_of_many_heads(arch: int) -> None:
    """The report's size at batch 1,024: a warp a head, of which ten fit. Triton 3.6 leaves 16 bytes on sm_90."""
    launch = backward(1024, 66, arch=arch)
    usage = cubins.compile_launch(launch, arch)
    assert launch.arguments["num_warps"] == 1 and usage.registers * 32 * 10 <= 65536
    assert usage.stack <= (16 if cubins.triton.__version__.startswith("3.6") else 0)
    assert backward(64, 66).arguments["num_warps"] == 2


@interprets
def test_interpreted() -> None:
    """What `triton_attention_checks.py` asserts."""
    result = interpreted("tests/triton_attention_checks.py")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
