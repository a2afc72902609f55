"""The Triton kernels compiled for real GPUs on a machine that has none: what the launchers choose must fit the chip.

`scripts/cubins.py` runs the launchers on `meta` tensors and compiles what they would launch, the full matrix. Here are

- in the ordinary run: on sm_90 every forward kernel that a preset selects at batch 64 or 1024, as trained under bf16
  autocast and at inference in bf16 (of the loss the report's and ImageNet's only), the report's size forward and
  backward in every dtype, DeiT-Ti and DeiT-S at 224 in bf16, `augment`; one specialisation of each kernel on sm_80 and
  sm_100;
- marked `slow`: all of bf16 on sm_90, forward and backward, with every dropout and drop-path, at every batch;
- in the script only: the matrix's other dtypes, and all of it on sm_80 and sm_100.

Forward kernels of 16 bits spill nothing on sm_90, nor do those of the report's size in bf16 on the others. What other
kernels spill is written in `triton_spills.txt`, and more is a failure.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import cubins  # noqa: E402

from deit_fast.backend import KernelError  # noqa: E402
from deit_fast.kernels.triton import (INTERPRETED, attention, attention_backward_kernels,  # noqa: E402
                                      attention_kernels, augment, augment_geometry, augment_kernels,
                                      block_backward_kernels, block_kernels, common, distillation_loss, layernorm_mlp,
                                      linear, linear_kernels, mlp_kernels, reduction, rowwise)
from deit_fast.kernels.triton.common import Launch, cdiv  # noqa: E402
from too_large import TooLarge  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: this process interprets and cannot compile")

LEDGER = cubins.Ledger()
NANO = "deit_nano_distilled_patch4_32"
TINY, SMALL = "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"
ALL_OPS = ["layernorm_linear", "attention", "linear_residual", "layernorm_mlp", "encoder_block", "distillation_loss"]
KERNEL_MODULES = (attention_backward_kernels, attention_kernels, augment_geometry, augment_kernels,
                  block_backward_kernels, block_kernels, linear_kernels, mlp_kernels, rowwise, reduction,
                  distillation_loss)


def launches(preset: str, dtype: str, names: list[str] = ALL_OPS, batch: int = 64, arch: int = 90) -> list[Launch]:
    """The distinct kernels of a training step on sm_<arch>."""
    found = {}
    for op, call in cubins.block_calls(preset, dtype, batch).items():
        if op in names:
            with cubins.products(dtype):
                found.update({cubins.specialisation(launch): launch
                              for launch in cubins.launches_of(op, call, arch=arch)})
    return list(found.values())


def large_loss_launches() -> list[Launch]:
    """The loss at ImageNet's batch, where its parts are added up by a second launch."""
    return cubins.launches_of("distillation_loss", cubins.block_calls(TINY, "bf16", batch=1024)["distillation_loss"])


def augmentation_launches() -> list[Launch]:
    """Every kernel of `augment`: plain ones at 224 pixels, where three launches share the work, and the weights'."""
    plain = cubins.augment_launches(224, torch.bfloat16, remode="const")
    return [*plain, cubins.augment_launches(32, torch.bfloat16, resizes=True)[0]]


def check(launch: Launch, arch: int, most_stack: float | None = None) -> None:
    """Compiles, fits into shared memory, and spills at most `most_stack` bytes per thread (None: the ledger's)."""
    usage = cubins.compile_launch(launch, arch)
    name = f"sm_{arch} {cubins.specialisation(launch)}"
    most_stack = LEDGER.allowed(launch, arch) if most_stack is None else most_stack
    assert usage.shared <= cubins.SHARED_LIMIT[arch], f"{name}: {usage}"
    assert usage.stack <= most_stack, f"{name} spills more than {most_stack} bytes: {usage}"
    if usage.stack < most_stack < float("inf"):
        warnings.warn(f"{most_stack} may be lowered to {usage.stack} in {LEDGER.path.name}: {name}", stacklevel=2)


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16", "bf16mixed"])
def test_report_size_on_hopper(dtype: str) -> None:
    """Every kernel of the report's training step compiles for sm_90 in every dtype and spills nothing.

    Products are in TF32 where torch's own are.
    """
    for launch in launches(NANO, dtype):
        check(launch, 90, 0)
        multiplies = "PRECISION" in launch.arguments
        assert ("tf32" in cubins.compiled_kernel(launch, 90).asm["ptx"]) == (dtype == "tf32" and multiplies)


@pytest.mark.parametrize(("name", "value"), [("allow_tf32", False), ("allow_tf32", True), ("fp32_precision", "tf32"),
                                             ("fp32_precision", "ieee")])
def test_products_follow_torchs_setting(name: str, value: object) -> None:
    """fp32 products are taken in TF32 exactly where torch.matmul takes them so, in every kernel that has any."""
    expected = "tf32" if value in (True, "tf32") else "ieee"
    before = getattr(torch.backends.cuda.matmul, name)
    setattr(torch.backends.cuda.matmul, name, value)
    try:
        for preset in (NANO, TINY, "deit_small_distilled_patch4_32"):
            for dtype, precision in (("fp32", expected), ("bf16", "ieee"), ("fp16mixed", "ieee")):
                found = [launch for op, call in cubins.block_calls(preset, dtype).items()
                         for launch in cubins.launches_of(op, call)]
                multiplying = [launch for launch in found if "PRECISION" in launch.kernel.arg_names]
                assert {launch.arguments["PRECISION"] for launch in multiplying} == {precision}, (preset, dtype)
    finally:  # torch answers no question about a mixture of both names
        setattr(torch.backends.cuda.matmul, name, before)


@pytest.mark.parametrize(("dtype", "mode"), [("bf16mixed", "train"), ("bf16", "inference")])
def test_forward_kernels_on_hopper(dtype: str, mode: str) -> None:
    """Every forward kernel that a preset selects at the report's batch or ImageNet's fits and spills nothing."""
    block_ops = [op for op in ALL_OPS if op != "distillation_loss"]
    cells = [cell for cell in cubins.matrix(cubins.PRESETS, block_ops, [dtype], [64, 1024], [mode])
             if cubins.sixteen_bit_forward(cell.launch)]
    assert len(cells) > 20
    for cell in cells:
        check(cell.launch, 90, 0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", cubins.PRESETS)
@pytest.mark.parametrize("dtype", ["bf16", "bf16mixed"])
def test_every_kernel_on_hopper(dtype: str, preset: str) -> None:
    """Forward and backward with and without every dropout, at every batch: spills are the ledger's."""
    for cell in cubins.matrix([preset], ALL_OPS, [dtype]):
        check(cell.launch, 90)


def test_mlp_of_large_batches_on_blackwell() -> None:
    """64 rows of the report's width at a time spill nothing on sm_100, with fp32 parameters neither."""
    for dtype in ("bf16", "bf16mixed"):
        check(launches(NANO, dtype, ["layernorm_mlp"], 1024, 100)[0], 100, 0)


@pytest.mark.parametrize(("preset", "batch"), [(NANO, 1024), (TINY, 128)])
def test_mlp_of_large_batches_on_hopper(preset: str, batch: int) -> None:
    """Larger batches choose other tiles: the MLP as trained spills nothing in forward nor at the report's size."""
    for launch in launches(preset, "bf16mixed", ["layernorm_mlp"], batch):
        if launch.kernel.__name__ != "reduction_kernel":
            check(launch, 90, 0 if preset == NANO else None)


@pytest.mark.parametrize("arch", [80, 100])
def test_every_kernel_on_other_chips(arch: int) -> None:
    """One specialisation of every kernel, bf16; neither 16-bit forward kernels nor those of the report's size spill."""
    seen = {launch.kernel.__name__: launch for launch in launches(NANO, "bf16", arch=arch)}
    for launch in seen.values():
        check(launch, arch, 0)
    for launch in [*launches(SMALL, "bf16", arch=arch), *large_loss_launches(), *augmentation_launches()]:
        if launch.kernel.__name__ not in seen:
            seen[launch.kernel.__name__] = launch
            check(launch, arch)


def test_deit_tiny_on_hopper() -> None:
    """DeiT-Ti at 224 pixels (C = 192, no power of two) in bf16 on sm_90."""
    for launch in launches(TINY, "bf16", ["layernorm_linear", "attention", "linear_residual", "layernorm_mlp"]):
        if launch.kernel.__name__ != "reduction_kernel":
            check(launch, 90)


def test_deit_small_on_hopper() -> None:
    """The kernels around cuBLAS, with and without dropout's Philox, on sm_90."""
    for launch in [*launches(SMALL, "bf16", ["layernorm_linear", "linear_residual", "layernorm_mlp"]),
                   *large_loss_launches()]:
        check(launch, 90)


def test_attention_dropout_on_hopper() -> None:
    """Attention's own dropout, which no preset switches on."""
    qkv, heads, *_ = cubins.block_calls(NANO, "bf16")["attention"]
    for launch in cubins.launches_of("attention",
                                     (qkv, heads, None, 0.1, torch.empty((), dtype=torch.int64, device="meta"))):
        check(launch, 90)


def test_augment_at_the_reports_size_on_hopper() -> None:
    """At 32 pixels one launch does all, spills nothing, and two programs and more fit a multiprocessor's registers."""
    launch, = cubins.augment_launches(32, torch.bfloat16)
    check(launch, 90, 0)
    assert cubins.compile_launch(launch, 90).registers * 32 * launch.arguments["num_warps"] <= 65536 / 2


def test_augment_resizing_on_hopper() -> None:
    """Everything at once at 224 pixels: weights, means, pixels."""
    found = cubins.augment_launches(224, torch.bfloat16, resizes=True)
    assert len(found) == 3
    for launch in found:
        check(launch, 90, 0)


def test_augment_is_rounded_as_written() -> None:
    """No product is left for ptxas to fuse with a sum, and both outputs of 16 bits round to nearest."""
    launch, = cubins.augment_launches(32, torch.bfloat16)
    assembly = cubins.compiled_kernel(launch, 90).asm["ptx"]
    assert set(re.findall(r"\b(?:mul|add|sub|fma|sqrt)\.[a-z.]*f32\b", assembly)) <= {
        f"{name}.rn.f32" for name in ("mul", "add", "sub", "fma", "sqrt")}
    assert "fma.rn.f32" in assembly and "cvt.rn.bf16" in assembly


class NoGpu:
    """A driver for Triton's run time that names a GPU and has none: enough to compile as a launch would."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return cubins.GPUTarget("cuda", 90, 32)


def test_what_is_compiled_is_what_a_launch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own run time, given these arguments, specialises them alike: same signature, same code."""
    monkeypatch.setattr(cubins.triton.runtime.driver, "_active", NoGpu())

    def allocated(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(allocated, value))
        return torch.empty(16, dtype=value.dtype) if isinstance(value, torch.Tensor) else value

    for launch in launches(NANO, "bf16mixed", ["encoder_block"])[-2:]:  # the last has tuples among its arguments
        arguments = {name: allocated(value) for name, value in launch.arguments.items()}
        theirs, ours = launch.kernel.warmup(grid=launch.grid, **arguments), cubins.compiled_kernel(launch, 90)
        attributes, own = ({path: each for path, each in kernel.src.attrs.items() if each} for kernel in (theirs, ours))
        assert theirs.src.signature == ours.src.signature and attributes == own
        code, other = ([line for line in each.asm["ptx"].split(".section")[0].splitlines()
                        if not re.match(r"\s*(?:\.loc|\.file|//)", line)] for each in (theirs, ours))
        assert len(code) > 200 and code == other


def test_no_kernel_is_left_out() -> None:
    """The launches compiled above are of all kernels that exist."""
    existing = {name for module in KERNEL_MODULES for name in vars(module) if name.endswith("_kernel")}
    compiled = {launch.kernel.__name__ for launch in [*launches(NANO, "bf16"), *launches(SMALL, "bf16"),
                                                      *large_loss_launches(), *augmentation_launches()]}
    assert existing == compiled


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch that meets it raises KernelError, and from then on the op's why_not gives the reason."""
    monkeypatch.setattr(common, "FAILED", {})
    with pytest.raises(KernelError, match="Triton .* could not compile too_large_kernel here: out of resource"):
        common.launch("attention", TooLarge(), 1, torch.empty(1))
    monkeypatch.setattr(common, "INTERPRETED", True)  # so that a tensor on the CPU is not the reason
    assert "too_large_kernel" in attention.why_not(torch.empty(1, 2, 24), 2, None, 0.0, None)
    assert layernorm_mlp.why_not(torch.empty(1, 2, 8), *[None] * 6, 1e-6, 0.0, None, None) is None


def test_no_programs_no_launch() -> None:
    """An empty batch launches nothing."""
    with common.recording() as found:
        common.launch("attention", TooLarge(), 0, torch.empty(0))
    assert found == []
    common.launch("attention", TooLarge(), 0, torch.empty(0))


@pytest.mark.parametrize("mode", cubins.MODES)
def test_the_matrix_knows_every_batch(mode: str) -> None:
    """Powers of two beyond the matrix's batches select nothing new, nor do the small ones between them."""
    known = {cubins.specialisation(cell.launch) for cell in cubins.matrix([NANO, TINY, SMALL], ALL_OPS, ["bf16mixed"],
                                                                          modes=[mode])}
    for cell in cubins.matrix([NANO, TINY, SMALL], ALL_OPS, ["bf16mixed"], [24, 256, 512, 2048], [mode]):
        assert cubins.specialisation(cell.launch) in known, cell.batch


def test_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds what one version of Triton spills, but for Hopper's forward kernels of 16 bits; updates keep the rest."""
    path = tmp_path / "spills.txt"
    path.write_text(f"Triton {cubins.triton.__version__}\n")
    both = {name: cubins.launches_of(*call) for name, call in
            {dtype: ("layernorm_linear", cubins.block_calls(NANO, dtype)["layernorm_linear"])
             for dtype in ("fp32", "bf16")}.items()}
    (forward, backward, _), (plain, _, _) = both["bf16"], both["fp32"]
    keys = [f"sm_90 {cubins.specialisation(launch)}" for launch in (forward, backward, plain)]
    cubins.Ledger(path).update(dict(zip(keys, (8, 16, 24))))
    ledger = cubins.Ledger(path)
    ledger.update({keys[1]: 12, "sm_80 other_kernel": 0})
    ledger = cubins.Ledger(path)
    assert [ledger.allowed(launch, 90) for launch in (forward, backward, plain)] == [0, 12, 24]
    assert ledger.allowed(backward, 80) == 0 and "other_kernel" not in path.read_text()
    monkeypatch.setattr(cubins.triton, "__version__", "0.1")
    assert [ledger.allowed(launch, 90) for launch in (forward, backward)] == [0, float("inf")]
    ledger.update({keys[2]: 4})
    assert cubins.Ledger(path).bytes == {keys[2]: 4} and cubins.Ledger(path).version == "0.1"


WIDTHS = [1, 8, 17, 63, 64, 65, 100, 128, 192, 200, 256]
ROWS = [1, 2, 33, 500, 4224, 12672, 67584, 1_000_000]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("C", WIDTHS)
def test_row_tiles(C: int, itemsize: int) -> None:
    """Tiles are powers of two, cover the width, are no larger than the work, and fit into registers."""
    for M in ROWS:
        for F in (1, 10, C, 3 * C, 4 * C, 1000):
            for choose in (linear.forward_tiles, linear.backward_tiles, layernorm_mlp.forward_tiles,
                           layernorm_mlp.backward_tiles):
                tiles = choose(M, C, F, itemsize)
                for block in (tiles.BLOCK_M, tiles.BLOCK_F, tiles.BLOCK_C):
                    assert block >= 16 and block & (block - 1) == 0, (choose, M, C, F, tiles)
                assert tiles.BLOCK_C >= C and tiles.BLOCK_M < 2 * max(16, M) and tiles.BLOCK_F < 2 * max(16, F)
                assert tiles.BLOCK_M * max(tiles.BLOCK_C, tiles.BLOCK_F) <= 64 * 32 * tiles.num_warps * 2
            splits, rows = linear.row_splits(M, cdiv(F, 64), 32)
            assert rows % 32 == 0 and splits * rows >= M > (splits - 1) * rows
            assert splits == 1 or splits * cdiv(F, 64) <= linear.PROGRAMS


@pytest.mark.parametrize("D", [1, 8, 15, 16, 32, 64, 80, 128, 256])
def test_attention_tiles(D: int) -> None:
    """Every sequence is covered, the presets' with a tail of 16; one backward kernel serves the report's.

    dK and dV of head_dim 64 take fewer keys before Hopper, and dQ does not.
    """
    for itemsize in (2, 4):
        for N in (1, 2, 15, 16, 17, 64, 65, 66, 127, 128, 129, 196, 197, 198, 255, 256, 257, 1025):
            shapes = [attention.forward_shape(N, D, itemsize), attention.backward_shape(N, D, itemsize),
                      *attention.split_backward_shape(N, D, itemsize, 80),
                      *attention.split_backward_shape(N, D, itemsize)]
            for shape in filter(None, shapes):
                assert shape.FULL + shape.TAIL >= N and shape.FULL % shape.BLOCK_N == 0, (N, shape)
                assert shape.TAIL & (shape.TAIL - 1) == 0 and (shape.TAIL == 0 or shape.TAIL >= 16), (N, shape)
    for N, keys in ((66, 80), (65, 80), (198, 208), (197, 208)):
        shape = attention.forward_shape(N, 64, 2)
        assert shape.FULL + shape.TAIL == keys
    assert attention.backward_shape(66, 8, 2) == attention.Shape(32, 64, 64, 16, 2)
    assert attention.backward_shape(66, 8, 2, 8192) == attention.Shape(16, 64, 64, 16, 1)
    assert attention.backward_shape(66, 8, 4, 8192) == attention.Shape(16, 64, 64, 16, 4)
    assert not any(attention.backward_shape(*call) for call in ((129, 16, 2), (90, 32, 2), (90, 16, 4), (1025, 64, 2)))
    for arch, blocks in ((80, [64, 32]), (90, [64, 64]), (100, [64, 64])):
        assert [tiles.BLOCK_M for tiles in attention.split_backward_shape(198, 64, 2, arch)] == blocks


@pytest.mark.parametrize(("height", "width"), [
    (1, 1), (1, 33), (28, 28), (32, 32), (33, 17), (45, 45), (46, 45), (64, 64), (96, 96), (224, 224), (3, 1100),
    (384, 384), (1, 32768), (32768, 32768),
])
def test_augment_tiles(height: int, width: int) -> None:
    """A program holds an image that fits its registers; the sums of larger ones are shared, at most one per tile."""
    BLOCK, SPLITS, num_warps = augment.tiles(height, width)
    area = height * width
    assert BLOCK & (BLOCK - 1) == 0 and BLOCK <= 2048 and num_warps in (1, 2, 4, 8, 16)
    assert BLOCK <= 4 * 32 * num_warps
    if SPLITS == 0:
        assert BLOCK >= area and BLOCK < 2 * max(area, 32)
    else:
        assert area > 2048 and SPLITS & (SPLITS - 1) == 0 and SPLITS < 2 * cdiv(area, BLOCK) and SPLITS <= 16
    assert (SPLITS == 0) == (area <= 2048)


def test_augment_taps() -> None:
    """Bicubic interpolation sees four source pixels along a side, and more where the image shrinks."""
    assert augment.taps((32, 32), 32, 32) == augment.taps((8, 20), 32, 32) == 4
    assert augment.taps((500, 375), 224, 224) == 9 and augment.taps((375, 500), 224, 224) == 9
    assert augment.taps((5, 7), 1, 1) == 28
