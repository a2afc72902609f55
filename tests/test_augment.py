"""The op `augment`: native backends against the reference. What every backend refuses: test_augment_refusals.py.

Without noise the float32 results must be equal to the last bit: the backends share their integer arithmetic and their
roundings by construction. The reference itself is tested against torchvision and timm in test_augment_peers.py.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cuda_on_host
from augment_calls import NOISE, Call, calls, spoilt_calls
from augment_plans import MEAN, STD, random_images, random_plan
from deit_fast import ops, reference
from deit_fast.data.augmentation import Plan, Recipe, neutral_plan, sample_plan
from deit_fast.kernels import cpu
from deit_fast.ops.augment import OP
from needs import skip_or_fail
from test_random_calls import _threads, share  # noqa: F401, the fixture gives the threads back

ON_HOST = "cuda on a CPU"  # the same kernels, see cuda_on_host
NATIVE = [*(backend for backend in ("cpu", "cuda", "triton") if backend in OP.offers), ON_HOST]

GRID = [  # B, source, output, layout, recount
    (1, (1, 1), (1, 1), "chw", 1),
    (1, (5, 3), (1, 1), "chw", 1),
    (5, (32, 32), (32, 32), "chw", 1),
    (64, (32, 32), (32, 32), "hwc", 2),
    (7, (33, 17), (33, 17), "chw", 3),
    (6, (28, 40), (32, 24), "hwc", 1),
    (9, (16, 16), (31, 63), "chw", 2),
    (4, (96, 80), (64, 65), "chw", 1),
    (3, (40, 1200), (3, 1100), "hwc", 1),
    (3, (224, 224), (224, 224), "chw", 1),
    (2, (28, 28), (384, 384), "chw", 1),
    (3, (384, 384), (28, 28), "hwc", 1),
    (3, (250, 187), (224, 224), "chw", 1),
]


@pytest.fixture(params=NATIVE)
def native(request) -> str:
    reason = cuda_on_host.why_not() if request.param == ON_HOST else OP.why_not_here(request.param)
    if reason:
        skip_or_fail(request.param, reason)
    return request.param


def ours(backend: str, images: Tensor, labels: Tensor, plan: Plan, *settings, **named) -> tuple[Tensor, Tensor]:
    """The backend's outputs, on the CPU."""
    if backend == ON_HOST:
        return cuda_on_host.augment(images, labels, plan, *settings, **named)
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    inputs = images.to(device), labels.to(device), plan.to(device)
    return tuple(t.cpu() for t in ops.augment(*inputs, *settings, **named, backend=backend))


def batch(B: int, source, size, layout: str, recount: int, remode: str = "const",
          seed: int = 0) -> tuple[Tensor, Tensor, Plan]:
    M = 2 * B + 1
    return (random_images(M, *source, layout), torch.arange(M) % 10,
            random_plan(B, M, source, size, recount, remode, seed))


def both(backend: str, inputs: tuple[Tensor, Tensor, Plan], size, **settings) -> tuple[tuple[Tensor, Tensor], ...]:
    """(native, reference) outputs, on the CPU."""
    settings = {"smoothing": 0.1, **settings}
    expected = reference.augment(*inputs, MEAN, STD, 10, size, **settings)
    return ours(backend, *inputs, MEAN, STD, 10, size, **settings), expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("B", "source", "size", "layout", "recount"), GRID)
def test_equal_to_reference(native: str, B: int, source, size, layout: str, recount: int, seed: int) -> None:
    inputs = batch(B, source, size, layout, recount, seed=seed)
    (x, t), (expected, targets) = both(native, inputs, size)
    assert torch.equal(x, expected) and torch.equal(t, targets)


@pytest.mark.parametrize("J", [3, 4])
@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize(("layout", "padding_mode"), [("chw", "constant"), ("hwc", "reflect"), ("chw", "reflect")])
def test_each_shape_of_a_plan(native: str, layout: str, padding_mode: str, resizes: bool, J: int) -> None:
    """Without resized rows, without hue, and with either; reflected padding far outside too."""
    M, source, size = 40, (29, 33), (31, 30)
    for seed in range(2):
        plan = random_plan(33, M, source, size, seed=seed, resizes=resizes, hue=J == 4)
        inputs = random_images(M, *source, layout), torch.arange(M) % 10, replace(plan, padding_mode=padding_mode)
        (x, t), (expected, targets) = both(native, inputs, size)
        assert torch.equal(x, expected) and torch.equal(t, targets)


def test_rand_erasing(native: str) -> None:
    for seed in range(3):
        inputs = batch(20, (32, 30), (33, 32), "chw", 3, "rand", seed)
        (x, _), (expected, _) = both(native, inputs, (33, 32))
        assert (x - expected).abs().max() <= NOISE
        constant, _ = both(native, (*inputs[:2], replace(inputs[2], remode="const")), (33, 32))
        assert not torch.equal(x, constant[0])


def test_grayscale_sources(native: str) -> None:
    """A gray image is one plane, expanded to three channels without a copy."""
    gray = random_images(9, 30, 28)[:, :1]
    plan = random_plan(8, 9, (30, 28), (24, 26), seed=2)
    for images in (gray.expand(-1, 3, -1, -1), gray.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)):
        (x, _), (expected, _) = both(native, (images, torch.arange(9), plan), (24, 26))
        assert torch.equal(x, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_memory_formats(native: str, dtype: torch.dtype, channels_last: bool) -> None:
    inputs = batch(33, (32, 32), (32, 30), "chw", 2)
    (x, _), (expected, _) = both(native, inputs, (32, 30), dtype=dtype, channels_last=channels_last)
    assert x.dtype == dtype and x.stride() == expected.stride() and torch.equal(x, expected)
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_half_precision_extremes(native: str) -> None:
    """std from 1e-7 to 1e4 sends pixels through float16's subnormals, its largest numbers and infinity; then ties."""
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1).reshape(2, 3, 16, 16)
    labels, plan = torch.zeros(2, dtype=torch.int64), neutral_plan(torch.arange(2))
    for std in ((1e-7, 1e-4, 1.53e-5), (1e4, 3e3, 2e7)):
        for dtype in (torch.float16, torch.bfloat16):
            x, _ = ours(native, images, labels, plan, (0.5, 0.1, 0.0), std, 1, dtype=dtype)
            expected, _ = reference.augment(images, labels, plan, (0.5, 0.1, 0.0), std, 1, dtype=dtype)
            assert torch.equal(x, expected)
    pixels = images.int()
    even = pixels + pixels % 2 * (pixels % 4 - 2)  # odd ones lie between two numbers, and go to the multiple of 4
    for first, dtype in ((256, torch.bfloat16), (2048, torch.float16)):
        x, _ = ours(native, images, labels, plan, (-first / 255,) * 3, (1 / 255,) * 3, 1, dtype=dtype)
        assert torch.equal(x.int(), first + even)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("B", "source", "size", "layout", "recount"), GRID)
def test_noise(native: str, B: int, source, size, layout: str, recount: int, seed: int) -> None:
    inputs = batch(B, source, size, layout, recount, "pixel", seed)
    (x, _), (expected, _) = both(native, inputs, size)
    assert (x - expected).abs().max() <= NOISE
    (x16, _), (expected16, _) = both(native, inputs, size, dtype=torch.bfloat16)
    assert ((x16.float() - expected16.float()).abs() <= 2**-7 * expected16.float().abs() + NOISE).all()


def test_noise_near_its_limits(native: str) -> None:
    """A million numbers, so that the logarithm sees arguments near 0 and 1, and the angle every quadrant."""
    images, labels = torch.zeros((1, 3, 577, 600), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    plan = replace(neutral_plan(torch.tensor([0])), erase=torch.tensor([[[0, 0, 577, 600]]], dtype=torch.int32),
                   noise_key=torch.tensor([-0x123456789ABCDEF]))
    x, _ = ours(native, images, labels, plan, MEAN, STD, 1)
    expected = reference.augment(images, labels, plan, MEAN, STD, 1)[0].double()
    assert expected.abs().max() > 4.5 and expected.abs().min() < 1e-5
    assert ((x - expected).abs() <= 3e-7 * expected.abs() + 3e-8).all()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("B", [1, 7, 64])
def test_sampled_plans(native: str, mode: str, B: int) -> None:
    recipe = Recipe(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, reprob=0.5, remode="const",
                    mixup=0.8, cutmix=1.0, mixup_mode=mode)
    resized = replace(recipe, rrc=True, interpolation="random", vflip=0.5, hue=0.3, grayscale=0.2)
    images, labels = random_images(20, 32, 32), torch.arange(20) % 10
    for drawn in (recipe, replace(recipe, padding_mode="reflect"), resized):
        epoch = sample_plan(drawn, torch.arange(4 * B) % 20, 0, 0, B, 32)
        for start in range(0, 4 * B, B):
            (x, t), (expected, targets) = both(native, (images, labels, epoch[start:start + B]), None)
            assert torch.equal(x, expected) and torch.equal(t, targets)


@pytest.mark.parametrize(("mode", "B", "side", "gray", "channels_last"), [
    ("batch", 5, 28, True, False), ("elem", 7, 28, False, True), ("pair", 3, 224, True, True),
    ("elem", 1, 224, False, False), ("pair", 3, 384, False, True)])
def test_sampled_plans_of_any_size(native: str, mode: str, B: int, side: int, gray: bool, channels_last: bool) -> None:
    """Every mode in odd batches, gray sources, both memory formats; cropped, then resized."""
    cropped = Recipe(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.4, reprob=0.5, remode="const", mixup=0.8,
                     cutmix=1.0, mixup_mode=mode)
    images, labels = random_images(5, side, side), torch.arange(5)
    if gray:
        images = images[:, :1].expand(-1, 3, -1, -1)
    for recipe in (cropped, replace(cropped, rrc=True, interpolation="random", hue=0.3, grayscale=0.2)):
        plan = sample_plan(recipe, torch.arange(B) % 5, 0, 0, B, side)
        (x, t), (expected, targets) = both(native, (images, labels, plan), None, channels_last=channels_last)
        assert x.stride() == expected.stride() and torch.equal(x, expected) and torch.equal(t, targets)


@pytest.mark.parametrize("view", ["channels_last", "cropped", "strided", "reversed channels"])
def test_any_strides(native: str, view: str) -> None:
    base = random_images(9, 40, 40)
    images = {"channels_last": base.contiguous(memory_format=torch.channels_last), "cropped": base[:, :, 3:35, 2:34],
              "strided": base[:, :, ::2, 1::3], "reversed channels": base.transpose(2, 3)}[view]
    plan = random_plan(8, 9, images.shape[2:], (20, 21), seed=1)
    for source in (images, images.permute(0, 2, 3, 1)):
        (x, _), _ = both(native, (source, torch.arange(9), plan), (20, 21))
        expected, _ = reference.augment(images.contiguous(), torch.arange(9), plan, MEAN, STD, 10, (20, 21))
        assert torch.equal(x, expected)


def test_no_rows(native: str) -> None:
    for M in (0, 3):
        no_rows = neutral_plan(torch.zeros(0, dtype=torch.int64))
        inputs = (random_images(M, 8, 8), torch.zeros(M, dtype=torch.int64), no_rows)
        for channels_last in (False, True):
            (x, t), _ = both(native, inputs, (5, 6), channels_last=channels_last)
            assert x.shape == (0, 3, 5, 6) and t.shape == (0, 10)


def test_any_thread_count() -> None:
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    inputs = batch(65, (32, 32), (32, 32), "chw", 2, "pixel", seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(ops.augment(*inputs, MEAN, STD, 10, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for x, t in results[1:]:
        assert torch.equal(x, results[0][0]) and torch.equal(t, results[0][1])


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    from deit_fast.kernels.cpu import augment as launcher

    results = []
    for isa in cpu.module.supported_isas():
        if not cpu._built(isa):
            continue
        monkeypatch.setattr(launcher, "module", importlib.import_module(f"deit_fast._cpu_{isa}"))
        for dtype in (torch.float32, torch.float16):
            inputs = batch(40, (35, 33), (35, 33), "chw", 2, "pixel", seed=3)
            results.append(ops.augment(*inputs, MEAN, STD, 10, dtype=dtype, backend="cpu")[0])
    for i, x in enumerate(results):
        assert torch.equal(x, results[i % 2])


@share(0.7)
@given(calls(), st.sampled_from([1, 2, 3, 16]))
def test_random_calls(call: Call, threads: int) -> None:
    """Any shapes, layouts, settings and plans in range: the CPU kernel gives what the reference gives."""
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    torch.set_num_threads(threads)
    call.assert_served(*ops.augment(**call.arguments(), backend="cpu"))


@share(0.5)
@given(spoilt_calls(most_fields=2, most=40))
def test_random_calls_out_of_range(drawn: tuple[Call, list[str]]) -> None:
    """Values anywhere in their dtype: refused by name, or, where they happen to be in range, right numbers."""
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    call, names = drawn
    try:
        x, targets = ops.augment(**call.arguments(), backend="cpu")
    except ValueError as error:
        assert any(name in str(error) for name in names)
        with pytest.raises(ValueError, match=re.escape(str(error))):
            ops.augment(**call.arguments(), backend="reference")
    else:
        call.assert_served(x, targets)


# ---- compiled and registered ----

def test_compiles_without_a_break() -> None:
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    images, labels, plan = batch(16, (32, 32), (32, 32), "chw", 1)

    def step(images, labels, plan):
        x, t = ops.augment(images, labels, plan, MEAN, STD, 10, smoothing=0.1, backend="cpu")
        return x * 2, t

    compiled = torch.compile(step, fullgraph=True)
    for rows in (slice(0, 16), slice(0, 9), slice(3, 10)):
        part = replace(plan[rows], partner=torch.arange(len(plan[rows])).flip(0))
        for ours, expected in zip(compiled(images, labels, part), step(images, labels, part)):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_compiled_code_checks_values() -> None:
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    images, labels, plan = batch(4, (8, 8), (8, 8), "chw", 1)
    compiled = torch.compile(lambda p: ops.augment(images, labels, p, MEAN, STD, 10, backend="cpu"), fullgraph=True)
    compiled(plan)
    with pytest.raises(ValueError, match="plan.index must be in"):
        compiled(replace(plan, index=plan.index + 100))
