"""The op `augment`: native backends against the reference, and what every backend must refuse.

Without noise the float32 results must be equal to the last bit: the backends share their integer arithmetic and their
roundings by construction. The reference itself is tested against torchvision and timm in test_augment_peers.py.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from augment_plans import MEAN, STD, random_images, random_plan
from deit_fast import ops, reference
from deit_fast.backend import BackendError
from deit_fast.data.augmentation import Plan, Recipe, neutral_plan, sample_plan
from deit_fast.kernels import cpu
from deit_fast.ops.augment import OP
from deit_fast.ops.augment_values import check_values
from needs import skip_or_fail

EXAMPLES = int(os.environ.get("DEIT_FAST_EXAMPLES", "100"))
NATIVE = [backend for backend in ("cpu", "cuda", "triton") if backend in OP.offers]
NOISE = 2e-6  # |native - reference| of one N(0, 1) number: some roundings of 5.8, the largest there is

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
    reason = OP.why_not_here(request.param)
    if reason:
        skip_or_fail(request.param, reason)
    return request.param


def on(backend: str, images: Tensor, labels: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Plan]:
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    return images.to(device), labels.to(device), plan.to(device)


def batch(B: int, source, size, layout: str, recount: int, remode: str = "const",
          seed: int = 0) -> tuple[Tensor, Tensor, Plan]:
    M = 2 * B + 1
    return (random_images(M, *source, layout), torch.arange(M) % 10,
            random_plan(B, M, source, size, recount, remode, seed))


def both(backend: str, inputs: tuple[Tensor, Tensor, Plan], size, **settings) -> tuple[tuple[Tensor, Tensor], ...]:
    """(native, reference) outputs, on the CPU."""
    settings = {"smoothing": 0.1, **settings}
    ours = ops.augment(*on(backend, *inputs), MEAN, STD, 10, size, **settings, backend=backend)
    expected = reference.augment(*inputs, MEAN, STD, 10, size, **settings)
    return tuple(t.cpu() for t in ours), expected


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
    """std from 1e-7 to 1e4 sends pixels through float16's subnormals, its largest numbers and infinity."""
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1).reshape(2, 3, 16, 16)
    labels, plan = torch.zeros(2, dtype=torch.int64), neutral_plan(torch.arange(2))
    for std in ((1e-7, 1e-4, 1.53e-5), (1e4, 3e3, 2e7)):
        for dtype in (torch.float16, torch.bfloat16):
            x, _ = ops.augment(*on(native, images, labels, plan), (0.5, 0.1, 0.0), std, 1, dtype=dtype, backend=native)
            expected, _ = reference.augment(images, labels, plan, (0.5, 0.1, 0.0), std, 1, dtype=dtype)
            assert torch.equal(x.cpu(), expected)


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
    x, _ = ops.augment(*on(native, images, labels, plan), MEAN, STD, 1, backend=native)
    expected = reference.augment(images, labels, plan, MEAN, STD, 1)[0].double()
    assert expected.abs().max() > 4.5 and expected.abs().min() < 1e-5
    assert ((x.cpu() - expected).abs() <= 3e-7 * expected.abs() + 3e-8).all()


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


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_plans(data: st.DataObject) -> None:
    """Any shapes, layouts and plans in range: the CPU kernel equals the reference."""
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    side = st.integers(1, 70)
    B, source, size = data.draw(st.tuples(st.integers(0, 9), st.tuples(side, side), st.tuples(side, side)))
    M, recount, seed = B + 1, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2**20))
    plan = random_plan(B, M, source, size, recount, data.draw(st.sampled_from(["const", "rand", "pixel"])), seed,
                       data.draw(st.booleans()), data.draw(st.booleans()))
    images = random_images(M, *source, data.draw(st.sampled_from(["chw", "hwc"])), seed)
    inputs = images, torch.arange(M) % 10, plan
    (x, t), (expected, targets) = both("cpu", inputs, size, channels_last=data.draw(st.booleans()))
    assert torch.equal(t, targets) and (x.shape[0] == 0 or (x - expected).abs().max() <= NOISE)
    if plan.remode == "const":
        assert torch.equal(x, expected)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_plans_out_of_range(data: st.DataObject) -> None:
    """One value anywhere in an int32: refused by its name, or, where it happens to be in range, right numbers."""
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    images, labels, plan = batch(3, (9, 12), (10, 8), "chw", 2, seed=data.draw(st.integers(0, 100)))
    names = [name for name, tensor in plan.tensors().items() if tensor.dtype not in (torch.bool, torch.float32)]
    name = data.draw(st.sampled_from([name for name in names if name != "noise_key"]))
    tensor = getattr(plan, name).clone()
    near, far = st.integers(-40, 40), st.integers(-2**31, 2**31 - 1)
    value = data.draw(st.integers(0, 255) if tensor.dtype == torch.uint8 else st.one_of(near, far))
    tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
    plan = replace(plan, **{name: tensor})
    try:
        x, t = ops.augment(images, labels, plan, MEAN, STD, 10, (10, 8), backend="cpu")
    except ValueError as error:
        assert f"plan.{name}" in str(error)
    else:
        expected, targets = ops.augment(images, labels, plan, MEAN, STD, 10, (10, 8), backend="reference")
        assert torch.equal(x, expected) and torch.equal(t, targets)


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


# ---- refusals ----

BAD_VALUES = [  # field, row, value, how the message begins
    ("index", 2, -1, r"plan.index must be in \[0, 8\], got -1 in row 2"), ("index", 0, 9, "plan.index"),
    ("crop", 1, -33, r"plan.crop \(y\) must be in \[-32, 32\], got -33 in row 1"),
    ("crop", 1, 2**31 - 1, r"plan.crop \(y\)"),
    ("resized_crop", 1, 33, r"plan.resized_crop must be boxes \(y, x, h, w\) inside 32x32"),
    ("resized_crop", 0, -1, "plan.resized_crop"),
    ("jitter_order", 3, 0, "plan.jitter_order must be a permutation of 0, 1, 2, 3, got"),
    ("jitter_order", 3, 255, "plan.jitter_order"),
    ("jitter", 3, -1, "plan.jitter must be in"), ("jitter", 0, (64 << 16) + 1, "plan.jitter"),
    ("jitter", (2, 3), 32769, r"plan.jitter \(hue\) must be in \[-32768, 32768\]"),
    ("jitter", (0, 3), -32769, r"plan.jitter \(hue\)"),
    ("erase", 1, 33, r"plan.erase must be boxes \(y, x, h, w\) inside 32x32"), ("erase", 1, -1, "plan.erase"),
    ("erase", 1, 2**31 - 1, "plan.erase"),
    ("partner", 3, 4, r"plan.partner must be in \[0, 3\], got 4 in row 3"), ("partner", 0, -(2**63), "plan.partner"),
    ("lam", 2, -1e-6, r"plan.lam must be in \[0, 1\]"), ("lam", 0, 1.0001, "plan.lam"),
    ("lam", 0, float("nan"), "plan.lam"),
    ("cut", 3, 40, r"plan.cut must be boxes"), ("cut", 3, -(2**31), "plan.cut"),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("field", "row", "value", "text"), BAD_VALUES)
def test_values_are_refused_by_name(backend: str, field: str, row: int | tuple[int, int], value, text: str) -> None:
    if OP.why_not_here(backend):
        skip_or_fail(backend, OP.why_not_here(backend))
    images, labels, plan = batch(4, (32, 32), (32, 32), "chw", 1)
    images, labels = images[:9], labels[:9]
    tensor = getattr(plan, field).clone()
    tensor[row if isinstance(row, tuple) else (row, *(0,) * (tensor.dim() - 1))] = value
    if field == "jitter_order":
        tensor[row, 1:] = value
    with pytest.raises(ValueError, match=f"augment: {text}"):
        ops.augment(images, labels, replace(plan, **{field: tensor}), MEAN, STD, 10, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_labels_are_refused(backend: str) -> None:
    if OP.why_not_here(backend):
        skip_or_fail(backend, OP.why_not_here(backend))
    images, labels, plan = batch(4, (8, 8), (8, 8), "chw", 1)
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 9\], got {bad} in label of row"):
            ops.augment(images, labels.clone().fill_(bad), plan, MEAN, STD, 10, backend=backend)


def test_kernel_and_message_agree_on_what_is_wrong() -> None:
    """Random corruptions: the kernel's own check and check_values must accept and refuse the same plans."""
    if cpu.why_not():
        skip_or_fail("cpu", cpu.why_not())
    generator, refused = torch.Generator().manual_seed(0), 0
    for seed in range(210):
        images, labels, plan = batch(3, (9, 12), (10, 8), "chw", 2, seed=seed)
        name, tensor = list(plan.tensors().items())[seed % 14]
        tensor = tensor.clone()
        flat = tensor.view(-1)
        at = int(torch.randint(len(flat), (), generator=generator))
        if tensor.dtype != torch.bool:
            spread = 30_000 if name == "jitter" else 12
            flat[at] += int(torch.randint(-spread, spread + 1, (), generator=generator))
        plan = replace(plan, **{name: tensor})
        try:
            check_values(images, labels, list(plan.tensors().values()), 10, 10, 8)
        except ValueError as error:
            refused += 1
            with pytest.raises(ValueError) as caught:
                ops.augment(images, labels, plan, MEAN, STD, 10, (10, 8), backend="cpu")
            assert str(caught.value) == str(error)
        else:
            ops.augment(images, labels, plan, MEAN, STD, 10, (10, 8), backend="cpu")
    assert 20 < refused < 190


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"images": torch.zeros(7, 3, 8, 8)}, TypeError, "images must be a uint8 tensor, got torch.float32"),
    ({"images": torch.zeros(7, 8, 8, dtype=torch.uint8)}, ValueError,
     r"images must have shape \(M, 3, H, W\) or \(M, H, W, 3\)"),
    ({"images": torch.zeros(7, 1, 8, 8, dtype=torch.uint8)}, ValueError, "images must have shape"),
    ({"images": torch.zeros(7, 3, 0, 8, dtype=torch.uint8)}, ValueError, "images must have 1 to 32768 pixels"),
    ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError,
     "there are no images for a plan of 3 rows"),
    ({"labels": torch.zeros(7)}, TypeError, "labels must be a tensor of torch.int64"),
    ({"labels": torch.zeros(6, dtype=torch.int64)}, ValueError, r"labels must have shape \(7,\), got \(6,\)"),
    ({"labels": torch.zeros(7, dtype=torch.int64, device="meta")}, ValueError, "labels must be on cpu"),
    ({"crop": torch.zeros(3, 2)}, TypeError, "plan.crop must be a tensor of torch.int32"),
    ({"crop": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"plan.crop must have shape \(3, 2\), got \(2, 2\)"),
    ({"erase": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, r"plan.erase must be \(B, recount, 4\) int32"),
    ({"resized_crop": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"plan.resized_crop must have shape \(3, 4\)"),
    ({"resized_crop": torch.zeros(0, 3, dtype=torch.int32)}, ValueError, r"plan.resized_crop must have shape \(0, 4\)"),
    ({"jitter": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, r"plan.jitter_order must have shape \(3, 3\)"),
    ({"jitter": torch.zeros(3, 5, dtype=torch.int32)}, ValueError, r"plan.jitter_order must have shape \(3, 3\)"),
    ({"vflip": torch.zeros(3)}, TypeError, "plan.vflip must be a tensor of torch.bool"),
    ({"grayscale": torch.zeros(2, dtype=torch.bool)}, ValueError, r"plan.grayscale must have shape \(3,\)"),
    ({"remode": "noise"}, ValueError, "plan.remode must be 'pixel', 'rand' or 'const', got 'noise'"),
    ({"padding_mode": "edge"}, ValueError, "plan.padding_mode must be 'constant' or 'reflect', got 'edge'"),
    ({"mean": (0.5,)}, ValueError, "mean must be 3 finite numbers"),
    ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must be 3 finite positive numbers"),
    ({"num_classes": 0}, ValueError, "num_classes must be 1 or more"),
    ({"smoothing": 1.0}, ValueError, r"smoothing must be in \[0, 1\)"),
    ({"size": (8, 0)}, ValueError, "size must be 1 to 32768"),
    ({"dtype": torch.float64}, TypeError, "dtype must be float32, bfloat16 or float16"),
])
def test_calls_are_refused(change: dict, error: type[Exception], text: str) -> None:
    images, labels, plan = batch(3, (8, 8), (8, 8), "chw", 1)
    fields = {name: change.pop(name) for name in list(change) if hasattr(plan, name)}
    plan = replace(plan, **fields)
    call = {"images": images, "labels": labels, "plan": plan, "mean": MEAN, "std": STD, "num_classes": 10}
    with pytest.raises(error, match=f"augment: {text}"):
        ops.augment(**{**call, **change})


def test_backends_by_name() -> None:
    inputs = batch(2, (8, 8), (8, 8), "chw", 1)
    with pytest.raises(BackendError, match="augment: there is no backend 'metal'"):
        ops.augment(*inputs, MEAN, STD, 10, backend="metal")
    if OP.why_not_here("triton"):
        with pytest.raises(BackendError, match="augment: backend 'triton' cannot serve this call"):
            ops.augment(*inputs, MEAN, STD, 10, backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA GPU is available"):
            ops.augment(*inputs, MEAN, STD, 10, backend="cuda")
