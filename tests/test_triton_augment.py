"""The Triton kernels of `augment` against the reference, on a GPU or, started by test_triton_interpreted.py, on a CPU.

Small batches, every path: whole images and split ones, each transform, values out of range. Everything but noise is
equal to the last bit. In the interpreter `tl.fma` rounds twice, on a GPU once; here it rounds as on a GPU.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from torch import Tensor

from augment_calls import NOISE, Call, calls, clamped, spoilt_calls
from augment_plans import (CLAMPED, FAR, MEAN, STD, clamped_plans, far_apart, far_output, garbage, random_images,
                           random_plan)
from deit_fast import ops, reference
from deit_fast.backend import BackendError, KernelError
from deit_fast.data.augmentation import Plan, neutral_plan
from deit_fast.kernels.triton import INTERPRETED
from deit_fast.ops.augment import OP
from needs import skip_or_fail
from test_augment_refusals import BAD_VALUES, wrong_inputs
from test_random_calls import share

op_module = importlib.import_module("deit_fast.ops.augment")  # the package's attribute of that name is the op
DEVICE = "cpu" if INTERPRETED else "cuda"
DRAWN = {"most": 14 if INTERPRETED else 70,  # pixels: the interpreter is slow, and a GPU compiles for every size
         "dtypes": (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)}
Batch = tuple[Tensor, Tensor, Plan]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if OP.why_not_here("triton"):
        skip_or_fail("triton", OP.why_not_here("triton"))
    monkeypatch.setattr(op_module, "_CHECK", False)
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def rounded_once(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
            exact = x.data.astype(numpy.float64) * y.data.astype(numpy.float64) + z.data
            return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_fma", rounded_once)


def batch(B: int, source: tuple[int, int], size: tuple[int, int], layout: str = "chw", seed: int = 0,
          **options: object) -> Batch:
    M = 2 * B + 1
    plan = random_plan(B, M, source, size, seed=seed, **options)
    return random_images(M, *source, layout), torch.arange(M) % 10, plan


def ours(inputs: Batch, size: tuple[int, int], **settings: object) -> tuple[Tensor, Tensor]:
    images, labels, plan = inputs
    settings = {"smoothing": 0.1, **settings}
    outputs = ops.augment(images.to(DEVICE), labels.to(DEVICE), plan.to(DEVICE), MEAN, STD, 10, size, **settings,
                          backend="triton")
    return tuple(t.cpu() for t in outputs)


def expected(inputs: Batch, size: tuple[int, int], **settings: object) -> tuple[Tensor, Tensor]:
    return reference.augment(*inputs, MEAN, STD, 10, size, **{"smoothing": 0.1, **settings})


def assert_equal(inputs: Batch, size: tuple[int, int], **settings: object) -> None:
    (x, targets), (other_x, other_targets) = ours(inputs, size, **settings), expected(inputs, size, **settings)
    assert torch.equal(x, other_x) and torch.equal(targets, other_targets)


@pytest.mark.parametrize(("B", "source", "size", "layout", "seed"), [
    (1, (1, 1), (1, 1), "chw", 0), (6, (16, 16), (16, 16), "chw", 0), (4, (28, 40), (32, 24), "hwc", 1),
    (2, (50, 40), (64, 33), "chw", 0), (2, (50, 40), (64, 33), "hwc", 1), (2, (5, 700), (3, 700), "hwc", 2),
])
def test_crops_colors_boxes_mixing(B: int, source, size, layout: str, seed: int) -> None:
    """Without resizing and hue, whose rows are other kernels. The last sizes are split into tiles."""
    assert_equal(batch(B, source, size, layout, seed, resizes=False, hue=False), size, channels_last=seed == 1)


@pytest.mark.parametrize(("B", "source", "size", "layout", "seed"), [
    (1, (1, 1), (1, 1), "chw", 0), (6, (16, 16), (16, 16), "chw", 1), (3, (28, 40), (32, 24), "hwc", 2),
    (2, (52, 47), (46, 45), "chw", 3), (2, (7, 90), (3, 20), "hwc", 4),
])
def test_resizing_and_hue(B: int, source, size, layout: str, seed: int) -> None:
    assert_equal(batch(B, source, size, layout, seed), size)


def test_resizing_every_way() -> None:
    """Enlarged and shrunk in either direction, by both filters, mirrored, nothing else."""
    boxes = torch.tensor([[0, 0, 40, 37], [3, 1, 9, 36], [39, 36, 1, 1], [11, 0, 12, 5]], dtype=torch.int32)
    plan = replace(neutral_plan(torch.arange(4)), resized_crop=boxes, flip=torch.arange(4) % 2 == 1,
                   vflip=torch.arange(4) % 3 == 1)
    for bicubic in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        assert_equal((random_images(4, 40, 37), torch.arange(4), replace(plan, bicubic=bicubic)), (12, 25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    inputs = batch(3, (16, 16), (16, 15), resizes=False)
    if INTERPRETED and dtype == torch.bfloat16:
        assert "interpreter" in OP.why_not("triton", *_call(inputs, dtype))
        return
    for channels_last in (False, True):
        x, _ = ours(inputs, (16, 15), dtype=dtype, channels_last=channels_last)
        other, _ = expected(inputs, (16, 15), dtype=dtype, channels_last=channels_last)
        assert x.dtype == dtype and x.stride() == other.stride() and torch.equal(x, other)


def _call(inputs: Batch, dtype: torch.dtype) -> tuple:
    images, labels, plan = inputs
    return (images, labels, list(plan.tensors().values()), plan.remode, plan.padding_mode, MEAN, STD, 10, 16, 15, 0.0,
            dtype, False)


@pytest.mark.parametrize("remode", ["pixel", "rand"])
@pytest.mark.parametrize("size", [(16, 16), (46, 45)])
def test_noise(size: tuple[int, int], remode: str) -> None:
    """Equal where nothing is erased, within a few roundings elsewhere."""
    inputs = batch(2, size, size, seed=3, remode=remode, resizes=False)
    (x, _), (other, _) = ours(inputs, size), expected(inputs, size)
    assert (x - other).abs().max() <= NOISE
    _, _, plan = inputs
    without = replace(plan, erase=plan.erase * 0)
    changed = expected((inputs[0], inputs[1], without), size)[0] != other
    assert changed.any() and torch.equal(x[~changed], other[~changed])


def test_noise_near_its_limits() -> None:
    """Many numbers, so that the logarithm sees arguments near 0 and 1, and the angle every quadrant."""
    H, W = 64, 255
    plan = replace(neutral_plan(torch.tensor([0])), erase=torch.tensor([[[0, 0, H, W]]], dtype=torch.int32),
                   noise_key=torch.tensor([-0x123456789ABCDEF]))
    inputs = torch.zeros((1, 3, H, W), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), plan
    x, other = ours(inputs, (H, W))[0], expected(inputs, (H, W))[0].double()
    assert other.abs().max() > 4 and other.abs().min() < 1e-4
    assert ((x - other).abs() <= 3e-7 * other.abs() + 3e-8).all()


def test_half_precision_extremes() -> None:
    """std from 1e-7 to 1e4 sends pixels through float16's subnormals, its largest numbers and infinity."""
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1).reshape(2, 3, 16, 16).to(DEVICE)
    labels, plan = torch.zeros(2, dtype=torch.int64, device=DEVICE), neutral_plan(torch.arange(2, device=DEVICE))
    for std in ((1e-7, 1e-4, 1.53e-5), (1e4, 3e3, 2e7)):
        call = images, labels, plan, (0.5, 0.1, 0.0), std, 1
        assert torch.equal(ops.augment(*call, dtype=torch.float16, backend="triton")[0],
                           reference.augment(*call, dtype=torch.float16)[0])


@pytest.mark.parametrize("view", ["channels_last", "cropped", "strided", "transposed"])
def test_any_strides(view: str) -> None:
    base = random_images(3, 24, 24)
    images = {"channels_last": base.contiguous(memory_format=torch.channels_last), "cropped": base[:, :, 3:19, 2:18],
              "strided": base[:, :, ::2, 1::3], "transposed": base.transpose(2, 3)}[view]
    plan = random_plan(2, 3, tuple(images.shape[2:]), (10, 11), seed=1, resizes=False)
    for source in (images, images.permute(0, 2, 3, 1)):
        x, _ = ours((source, torch.arange(3), plan), (10, 11))
        assert torch.equal(x, expected((images.contiguous(), torch.arange(3), plan), (10, 11))[0])


def test_slices_of_an_epoch() -> None:
    """A batch is a slice of a plan, whose pointers are aligned to nothing."""
    images, labels, plan = batch(7, (12, 12), (12, 12), resizes=False)
    plan = replace(plan, partner=torch.arange(7) % 2)
    for rows in (slice(1, 3), slice(5, 7)):
        assert_equal((images, labels, plan[rows]), (12, 12))


def test_no_rows_and_many_classes() -> None:
    images, labels = random_images(3, 8, 8).to(DEVICE), torch.tensor([0, 2999, 1500], device=DEVICE)
    x, targets = ops.augment(images, labels, neutral_plan(torch.zeros(0, dtype=torch.int64, device=DEVICE)), MEAN, STD,
                             3000, backend="triton")
    assert x.shape == (0, 3, 8, 8) and targets.shape == (0, 3000)
    plan = replace(neutral_plan(torch.arange(3, device=DEVICE)), partner=torch.tensor([1, 2, 0], device=DEVICE),
                   lam=torch.tensor([0.25, 1.0, 0.7], device=DEVICE))
    call = images, labels, plan, MEAN, STD, 3000, None, 0.1
    assert torch.equal(ops.augment(*call, backend="triton")[1], reference.augment(*call)[1])


@pytest.mark.parametrize(("field", "value", "meant"), CLAMPED)
def test_values_are_clamped(field: str, value: float, meant: float) -> None:
    """No value can make the kernel read outside the images; numbers outside their range count as its nearest end."""
    images, labels, wrong, right = clamped_plans(field, value, meant)
    x, targets = ours((images, labels, wrong), (12, 12))
    other, other_targets = expected((images, labels, right), (12, 12))
    assert torch.equal(x, other) and torch.equal(targets, other_targets)


@pytest.mark.parametrize(("field", "row", "value", "text"), BAD_VALUES)
def test_values_are_refused_with_the_check(monkeypatch: pytest.MonkeyPatch, field: str, row: int | tuple[int, int],
                                           value: float, text: str) -> None:
    """DEIT_FAST_CHECK=1 refuses by name what is clamped without it."""
    monkeypatch.setattr(op_module, "_CHECK", True)
    with pytest.raises(ValueError, match=f"augment: {text}"):
        ours(wrong_inputs(field, row, value), (32, 32))


def test_the_check_lets_right_values_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "_CHECK", True)
    assert_equal(batch(2, (8, 8), (8, 8), resizes=False), (8, 8))


@pytest.mark.parametrize("kernel", ["augment_weights_kernel", "augment_gray_kernel", "augment_fwd_kernel"])
def test_a_kernel_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                    kernel: str) -> None:
    """The automatic order says so once and goes on with the next backend; by name it raises."""
    from deit_fast.kernels.triton import augment as launcher
    from deit_fast.kernels.triton.common import FAILED
    from too_large import TooLarge

    monkeypatch.setattr(launcher, kernel, TooLarge())
    monkeypatch.setattr("deit_fast.backend.BY_NAME_ONLY", ())
    for name in set(OP.offers) - {"triton"}:
        monkeypatch.delitem(OP.offers, name)
    inputs = tuple(t.to(DEVICE) for t in batch(2, (8, 9), (46, 45), seed=1))  # resized, too large for one program
    call = *inputs, MEAN, STD, 10, (46, 45)
    for _ in range(2):
        assert torch.equal(ops.augment(*call)[0], reference.augment(*call)[0])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of resource: shared memory" in said and "'reference' serves augment" in said
    assert "too_large_kernel" in OP.why_not("triton", *_call(inputs, torch.float32))
    with pytest.raises(BackendError, match="cannot serve this call: .*out of resource"):
        ops.augment(*call, backend="triton")
    FAILED.clear()
    with pytest.raises(KernelError, match="augment: .*out of resource"):
        ops.augment(*call, backend="triton")


@pytest.mark.parametrize("size", [(9, 10), (46, 45)])
def test_garbage_is_survived(size: tuple[int, int]) -> None:
    """Any bits in any field: finite pixels in return."""
    images, labels, plan = batch(2, (12, 11), size, seed=1)
    x, targets = ours((images, labels, garbage(plan)), size)
    assert x.isfinite().all() and targets.isfinite().all()


def served(call: Call) -> tuple[Tensor, Tensor]:
    inputs = (tensor.to(DEVICE) for tensor in (call.images, call.labels, call.plan))
    return tuple(t.cpu() for t in ops.augment(*inputs, **call.settings, backend="triton"))


@share(0.03)
@given(calls(rows=(0, 3), **DRAWN))
def test_random_calls(call: Call) -> None:
    """Any shapes, layouts, settings and plans in range."""
    call.assert_served(*served(call))


@share(0.03)
@given(spoilt_calls(most_fields=12, rows=(1, 2), **DRAWN))
def test_random_calls_out_of_range(drawn: tuple[Call, list[str]]) -> None:
    """Values anywhere in their dtype, in several fields at once: the pixels and targets of the clamped plan."""
    call, _names = drawn
    clamped(call).assert_served(*served(call))


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize("strides", FAR)
def test_sources_far_apart(strides: tuple[int, ...], resizes: bool) -> None:
    """Offsets inside an image, and between images, beyond 2^31."""
    plan = replace(random_plan(2, 4, (32, 32), (20, 24), seed=3, resizes=resizes), index=torch.tensor([3, 2]))
    images = random_images(4, 32, 32)
    x, _ = ours((far_apart(images, strides, DEVICE), torch.arange(4), plan), (20, 24))
    assert torch.equal(x, expected((images, torch.arange(4), plan), (20, 24))[0])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU makes all rows: test_augment_far.py")
@pytest.mark.parametrize("channels_last", [False, True])
def test_last_rows_of_a_large_output(monkeypatch: pytest.MonkeyPatch, channels_last: bool) -> None:
    """The programs of the last rows of more than 2^31 elements; the other programs do not run."""
    from deit_fast.kernels.triton import augment as launcher
    from triton.runtime.interpreter import interpreter_builder

    B, last, inputs, (other, other_targets) = far_output(46, channels_last)  # an image is three tiles
    plain = launcher.launch

    def launch(op: str, kernel: object, grid: int, *call: object, **arguments: object) -> None:
        begin = grid // B * (B - last)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_idx",
                          lambda x, y, z: setattr(interpreter_builder, "grid_idx", (begin + x, y, z)))
            plain(op, kernel, grid - begin, *call, **arguments)

    monkeypatch.setattr(launcher, "launch", launch)
    x, targets = ops.augment(*inputs, MEAN, STD, 10, 46, dtype=torch.float16, channels_last=channels_last,
                             backend="triton")
    assert torch.equal(x[-last:], other) and torch.equal(targets[-last:], other_targets)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_replayed_from_a_gpu_graph(backend: str) -> None:
    """A CUDA graph of the call, replayed on another plan, gives what a plain call gives; capture fails on any sync."""
    if not torch.cuda.is_available():
        skip_or_fail(backend, "there is no CUDA GPU")
    if OP.why_not_here(backend):
        skip_or_fail(backend, OP.why_not_here(backend))
    for size in ((32, 32), (64, 65)):
        images, labels, plan = (t.to(DEVICE) for t in batch(5, (40, 44), size, remode="pixel"))
        _, _, other = batch(5, (40, 44), size, remode="pixel", seed=2)
        call = images, labels, plan, MEAN, STD, 10, size, 0.1, torch.bfloat16
        ops.augment(*call, backend=backend)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x, targets = ops.augment(*call, backend=backend)
        for mine, theirs in zip(plan.tensors().values(), other.tensors().values(), strict=True):
            mine.copy_(theirs)
        graph.replay()
        plain, plain_targets = ops.augment(*call, backend=backend)
        assert torch.equal(x, plain) and torch.equal(targets, plain_targets)
