"""The encoder block's one Triton kernel, compiled for real GPUs on a machine that has none; its tiles and its limits."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from deit_fast.kernels.triton import INTERPRETED, common, encoder_block, linear  # noqa: E402
from deit_fast.kernels.triton.common import Launch, cdiv  # noqa: E402
from test_triton_cubins import NANO, check, cubins  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: this process interprets and cannot compile")


def block_forward(dtype: str, save: bool = True, **change: object) -> list[Launch]:
    """The launches of encoder_block's forward at the report's size, its arguments changed as named."""
    call = encoder_block.Arguments(*cubins.block_calls(NANO, dtype)["encoder_block"])._replace(**change)
    with common.recording() as found:
        encoder_block.forward(*call, save=save)
    return found


def test_block_at_the_reports_size_on_hopper() -> None:
    """Two programs fit a multiprocessor's registers, in training and in inference; attention's dropout takes more."""
    inference = {"save": False, "dropout_p": 0.0, "seed": None}
    for settings in ({}, inference, {"attn_dropout_p": 0.1}):
        launch, = block_forward("bf16", **settings)
        check(launch, 90, 0)
        registers = cubins.compile_launch(launch, 90).registers * 32 * launch.arguments["num_warps"]
        assert registers <= 65536 / 2 or "attn_dropout_p" in settings


@pytest.mark.parametrize("dtype", ["bf16mixed", "fp32"])
def test_block_in_a_training_step(dtype: str) -> None:
    """Five launches; backward's own spill nothing on any chip, nor do the sums of all gradients."""
    call = cubins.block_calls(NANO, dtype)["encoder_block"]
    for arch in cubins.SHARED_LIMIT:
        found = cubins.launches_of("encoder_block", call, arch=arch)
        assert [launch.kernel.__name__ for launch in found] == [
            "encoder_block_fwd_kernel", "encoder_block_bwd_mlp_kernel", "attention_bwd_kernel",
            "encoder_block_bwd_qkv_kernel", "reduction_kernel"]
        for launch in (found[1], found[3], found[4]) if dtype != "fp32" or arch == 90 else ():
            check(launch, arch, 0)


def test_wide_blocks_of_large_batches_on_hopper() -> None:
    """At C = 128, which no preset has, with more row tiles than programs: neither the block nor its ops spill."""
    call = encoder_block.Arguments(*cubins.block_calls(NANO, "bf16", batch=512)["encoder_block"])
    wide = {name: each.new_empty([2 * side if side in (64, 192, 256) else side for side in each.shape])
            for name, each in call._asdict().items() if isinstance(each, torch.Tensor)}
    call = call._replace(**wide)
    for op, arguments in (("encoder_block", call), ("layernorm_linear", call.layernorm_linear())):
        for launch in cubins.launches_of(op, arguments):
            if launch.kernel.__name__ not in ("reduction_kernel", "attention_bwd_kernel"):
                check(launch, 90, 0)


def test_block_reads_qkv_behind_its_barrier() -> None:
    """What other threads of the program stored is read behind the barrier only, never through the cache for constants.

    The interpreter would not miss the barrier, for it runs a program as one thread.
    """
    launch, = block_forward("bf16")
    for arch in cubins.SHARED_LIMIT:
        compiled = cubins.compiled_kernel(launch, arch)
        lines = compiled.asm["ttgir"].splitlines()
        barrier, = (i for i, line in enumerate(lines) if re.match(r"\s*(?:gpu|ttg)\.barrier", line))
        stores = [i for i, line in enumerate(lines) if "tt.store" in line]
        by_heads = [i for i, line in enumerate(lines)
                    if re.search(r"tt\.load|async_copy", line) and re.search(r"tensor<\d+x\d+x\d+x!tt\.ptr", line)]
        assert min(stores) < barrier and sum(i > barrier for i in stores) == 4, "qkv; lse, y, h and out"
        assert len(by_heads) == 5 and min(by_heads) > barrier, "Q, and K and V of full blocks and of the tail"
        assert not re.search(r"ld\.global[.\w:]*\.nc", compiled.asm["ptx"])
        assert "bar.sync" in compiled.asm["ptx"]


def test_which_blocks_are_one_kernel() -> None:
    """C <= 128, N <= 256, three heads or more, and where the four save nothing that the one has not."""
    def kernels(dtype: str, **shape: int) -> set[str]:
        C, N, H = shape.get("C", 64), shape.get("N", 66), shape.get("H", 8)
        x_dtype, _ = cubins.DTYPES[dtype]
        x, w = torch.empty(2, N, C, dtype=x_dtype, device="meta"), torch.empty(C, C, device="meta")
        wide, tall = torch.empty(40, C, device="meta"), torch.empty(C, 40, device="meta")
        found = block_forward(dtype, x=x, ln1_weight=w[0], ln1_bias=None, qkv_weight=w.repeat(3, 1), qkv_bias=None,
                              proj_weight=w, proj_bias=None, ln2_weight=w[0], ln2_bias=None, fc1_weight=wide,
                              fc1_bias=None, fc2_weight=tall, fc2_bias=None, num_heads=H)
        return {launch.kernel.__name__ for launch in found}

    one = {"encoder_block_fwd_kernel"}
    assert kernels("bf16mixed") == kernels("fp32") == kernels("bf16mixed", C=126, N=256, H=3) == one
    for dtype, shape in (("bf16mixed", {"C": 136}), ("bf16mixed", {"N": 257}), ("bf16mixed", {"H": 2}),
                         ("fp32", {"C": 72})):
        assert "attention_fwd_kernel" in kernels(dtype, **shape) and not kernels(dtype, **shape) & one


@pytest.mark.parametrize("H", [3, 4, 5, 8, 12])
def test_block_tiles(H: int) -> None:
    """Tiles are powers of two that cover heads, channels and tokens, and fit into registers."""
    for itemsize in (2, 4):
        for D in (1, 5, 8, 16, 24, 40):
            for N in (1, 15, 16, 17, 63, 64, 66, 128, 198, 256) if D * H <= 128 else ():
                tile = encoder_block.tiles(N, D * H, H, 4 * D * H, itemsize)
                assert tile.FULL + tile.TAIL >= N and tile.FULL % tile.BLOCK_N == 0
                sides = (tile.BLOCK_R, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_D, tile.BLOCK_F, tile.BLOCK_C,
                         tile.BLOCK_H * tile.BLOCK_V)  # of products: at least 16
                assert all(side >= 16 and side & (side - 1) == 0 for side in sides), tile
                assert tile.BLOCK_D >= D and tile.BLOCK_V >= D and tile.BLOCK_C >= D * H
                scores = tile.BLOCK_H * tile.BLOCK_M * max(tile.BLOCK_N, tile.TAIL, tile.BLOCK_V)
                assert scores <= 64 * 32 * tile.num_warps, tile


def test_block_shares() -> None:
    """Programs per image: as many as its row tiles for one image, one where images are many, none without work."""
    assert encoder_block.shares(1, 5) == 5 and encoder_block.shares(0, 5) == 5
    for B in (1, 50, 64, 66, 100, 132, 264, 1000):
        for row_tiles in (1, 2, 5, 13, 16):
            found = encoder_block.shares(B, row_tiles)
            assert 1 <= found <= row_tiles and (found == 1 or B * found <= linear.PROGRAMS)
            assert cdiv(row_tiles, found) * (found - 1) < row_tiles, "a program has nothing to do"
