"""The CUDA kernels of `augment` on a CPU: what depends on blocks, threads, shared memory and alignment.

The parity table runs through them in test_augment.py, there with threads in one order. Here they run in every order
that the headers in cuda_on_host know, on the sizes around which the kernels change their ways.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

import cuda_on_host
from augment_calls import Call, calls, clamped, spoilt_calls
from augment_plans import CLAMPED, MEAN, STD, clamped_plans, garbage, random_images, random_plan
from deit_fast import reference
from deit_fast.data.plan import Plan, neutral_plan
from test_random_calls import share

pytestmark = pytest.mark.skipif(cuda_on_host.why_not() is not None, reason=str(cuda_on_host.why_not()))
every_schedule = pytest.mark.parametrize("schedule", cuda_on_host.SCHEDULES)


def batch(B: int, source: tuple[int, int], size: tuple[int, int], layout: str = "chw", seed: int = 0,
          **options: object) -> tuple[Tensor, Tensor, Plan]:
    M = 2 * B + 1
    return (random_images(M, *source, layout), torch.arange(M) % 10,
            random_plan(B, M, source, size, seed=seed, **options))


def assert_equal(inputs: tuple[Tensor, Tensor, Plan], size: tuple[int, int], **settings: object) -> None:
    x, targets = cuda_on_host.augment(*inputs, MEAN, STD, 10, size, 0.1, **settings)
    other, other_targets = reference.augment(*inputs, MEAN, STD, 10, size, 0.1, **settings)
    assert x.stride() == other.stride() and torch.equal(x, other) and torch.equal(targets, other_targets)


@every_schedule
@pytest.mark.parametrize(("B", "source", "size", "layout"), [
    (1, (32, 32), (32, 32), "chw"), (8, (32, 32), (32, 32), "hwc"),  # three blocks make the eight
    (5, (28, 28), (28, 28), "chw"), (4, (64, 64), (64, 64), "chw"),  # the smallest and the largest that are staged
    (4, (28, 36), (20, 28), "hwc"), (4, (16, 16), (33, 64), "chw"),  # tiles smaller and larger than images; odd sides
    (4, (30, 30), (32, 31), "chw"), (4, (64, 65), (64, 63), "hwc"),  # not whole vectors; too large
    (5, (100, 90), (160, 120), "chw"),  # several slices, several parts of the sum
])
def test_every_order_of_threads(B: int, source, size, layout: str, schedule: str) -> None:
    """Missing barriers and waits give other numbers in some order."""
    with cuda_on_host.schedule(schedule):
        for seed in range(2):
            assert_equal(batch(B, source, size, layout, seed, resizes=seed == 0), size, channels_last=seed == 0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", range(28, 37))
def test_widths(width: int, dtype: torch.dtype, channels_last: bool) -> None:
    """Vectors where rows are whole ones, else their elements."""
    assert_equal(batch(4, (32, 32), (30, width)), (30, width), dtype=dtype, channels_last=channels_last)


@pytest.mark.parametrize("offset", [0, 1, 4, 16])
@pytest.mark.parametrize("side", [32, 72])
def test_images_anywhere(offset: int, side: int) -> None:
    """Images that begin at no multiple of 16, or of 4, bytes are neither copied by vectors nor read by words."""
    images, labels, plan = batch(3, (side, side), (side, side), resizes=False)  # whose tiles would be aligned
    space = torch.zeros(images.numel() + 64 + offset, dtype=torch.uint8)
    moved = space[-space.data_ptr() % 64 + offset:][:images.numel()].view(images.shape).copy_(images)
    assert moved.data_ptr() % 64 == offset
    assert_equal((moved, labels, plan), (side, side))


@pytest.mark.parametrize("pixels", [(3072, 1024, 32, 1), (4096, 1024, 32, 1), (3088, 1024, 32, 1), (3080, 1024, 32, 1),
                                    (3073, 1024, 32, 1), (3072, 1, 96, 3), (4096, 1, 96, 3), (2048, 0, 32, 1),
                                    (8192, 2048, 64, 1), (8192, 2048, 64, 2), (8192, 1, 256, 4)])
def test_strides(pixels: tuple[int, int, int, int]) -> None:
    """Dense, padded, gray and interleaved images; strides of image, channel, y and x."""
    labels, plan = torch.arange(9) % 10, random_plan(4, 9, (32, 32), (32, 32), resizes=False)
    space = random_images(1, 1, 9 * 8192).flatten()
    space = space[-space.data_ptr() % 64:]
    assert_equal((space.as_strided((9, 3, 32, 32), pixels), labels, plan), (32, 32))


@every_schedule
def test_more_images_than_blocks(schedule: str) -> None:
    """Each of three blocks makes some twenty, with and without a partner, contrast and a resized crop."""
    with cuda_on_host.schedule(schedule):
        assert_equal(batch(61, (12, 16), (16, 12), seed=5), (16, 12), dtype=torch.bfloat16)


@pytest.mark.parametrize(("field", "value", "meant"), CLAMPED)
def test_values_are_clamped(field: str, value: float, meant: float) -> None:
    """No value can make the kernel read outside the images; numbers outside their range count as its nearest end."""
    images, labels, wrong, right = clamped_plans(field, value, meant)
    x, targets = cuda_on_host.augment(images, labels, wrong, MEAN, STD, 10, (12, 12))
    other, other_targets = reference.augment(images, labels, right, MEAN, STD, 10, (12, 12))
    assert torch.equal(x, other) and torch.equal(targets, other_targets)


@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
@pytest.mark.parametrize("size", [(9, 12), (12, 12), (70, 66)])
def test_garbage_is_survived(size: tuple[int, int], padding_mode: str) -> None:
    """Any bits in any field: finite pixels in return."""
    for layout in ("chw", "hwc"):
        images, labels, plan = batch(7, (12, 12), size, layout, seed=1, remode="rand")
        plan = replace(garbage(plan), padding_mode=padding_mode)
        x, targets = cuda_on_host.augment(images, labels, plan, MEAN, STD, 10, size)
        assert x.isfinite().all() and targets.isfinite().all()


def test_many_classes() -> None:
    plan = replace(neutral_plan(torch.arange(3)), partner=torch.tensor([1, 2, 0]), lam=torch.tensor([0.25, 1.0, 0.7]))
    call = random_images(3, 8, 8), torch.tensor([0, 2999, 1500]), plan, MEAN, STD, 3000, None, 0.1
    assert torch.equal(cuda_on_host.augment(*call)[1], reference.augment(*call)[1])


@share(0.15)
@given(calls(rows=(0, 5)))
def test_random_calls(call: Call) -> None:
    """Any shapes, layouts, settings and plans in range."""
    call.assert_served(*cuda_on_host.augment(**call.arguments()))


@share(0.15)
@given(spoilt_calls(most_fields=12, most=40))
def test_random_calls_out_of_range(drawn: tuple[Call, list[str]]) -> None:
    """Values anywhere in their dtype, in several fields at once: the pixels and targets of the clamped plan."""
    call, _names = drawn
    clamped(call).assert_served(*cuda_on_host.augment(**call.arguments()))
