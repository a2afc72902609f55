"""`BatchAugment` beside the two libraries that it replaces: their targets and pixels, its own reproducible draws."""

from __future__ import annotations

import inspect
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from augment_plans import MEAN, STD, random_images
from deit_fast import BackendError, use_backend
from deit_fast.backend import record
from deit_fast.data import BatchAugment
from deit_fast.data.augmentation import Plan, Recipe
from deit_fast.data.loader import TrainLoader
from deit_fast.data.split import Split

B, H, W, K = 12, 20, 16, 5
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": K}
PIXELS = {"mean": MEAN, "std": STD}
FULL = {"crop_pad": 3, "hflip": 0.5, "brightness": 0.3, "saturation": 0.3, "reprob": 0.5}
LABELS = torch.arange(B) % K
IMAGES = random_images(B, H, W)
FLOATS = (IMAGES / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def draws(**options) -> Plan:
    """The plan of the first call of BatchAugment(**options) on B images."""
    return BatchAugment(**options)._next_plan(B, (H, W), (H, W), torch.device("cpu"))


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the two libraries ----


@pytest.mark.parametrize("images", [IMAGES, FLOATS], ids=["uint8", "float"])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("correct_lam", [True, False])
def test_timm_with_the_same_draws(monkeypatch, images: Tensor, mode: str, seed: int, correct_lam: bool) -> None:
    timm_mixup = pytest.importorskip("timm.data.mixup")
    options = BOTH | {"mode": mode, "label_smoothing": 0.1, "correct_lam": correct_lam}
    plan = draws(seed=seed, **options)
    cuts, boxes = plan.cut[:, 2:].prod(1) > 0, iter(plan.cut[plan.cut[:, 2:].prod(1) > 0].tolist())
    theirs = timm_mixup.Mixup(**options)
    theirs._params_per_elem = lambda size: (plan.lam[:size].numpy().copy(), cuts[:size].numpy())
    theirs._params_per_batch = lambda: (float(plan.lam[0]), bool(cuts[0]))

    def next_box(_shape, lam, **_):
        y, x, h, w = next(boxes)
        return (y, y + h, x, x + w), 1 - h * w / (H * W) if correct_lam else lam

    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", next_box)
    expected, expected_targets = theirs(FLOATS.clone(), LABELS)
    kept = images.clone()
    ours, targets = BatchAugment(seed=seed, **options, **PIXELS)(images, LABELS)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(targets, expected_targets, rtol=0, atol=1e-6)
    assert torch.equal(images, kept) and not torch.allclose(ours, FLOATS, atol=1e-3)


@pytest.mark.parametrize("images", [IMAGES, FLOATS], ids=["uint8", "float"])
@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_torchvision_with_the_same_draws(images: Tensor, kind: str) -> None:
    """torchvision mixes with the image before, we with the one opposite: in a batch of two they are the same."""
    options = {"mixup_alpha": 0.8 * (kind == "MixUp"), "cutmix_alpha": 1.0 * (kind == "CutMix"), "label_smoothing": 0.0}
    transform, mixed = getattr(v2, kind)(num_classes=K), 0
    for seed in range(8):
        ours = BatchAugment(num_classes=K, seed=seed, **options, **PIXELS)
        plan = BatchAugment(num_classes=K, seed=seed, **options)._next_plan(2, (H, W), (H, W), torch.device("cpu"))
        (y, x, h, w), lam = plan.cut[0].tolist(), plan.lam[0].item()
        params = {"labels": LABELS[:2], "batch_size": 2, "lam": lam, "lam_adjusted": lam, "box": (x, y, x + w, y + h)}
        result, targets = ours(images[:2], LABELS[:2])
        torch.testing.assert_close(result, transform.transform(FLOATS[:2], params), rtol=0, atol=2e-6)
        torch.testing.assert_close(targets, transform.transform(params["labels"], params), rtol=0, atol=1e-6)
        mixed += lam < 1
    assert mixed >= 6


def test_arguments_and_defaults_are_timms() -> None:
    theirs = inspect.signature(pytest.importorskip("timm.data.mixup").Mixup).parameters
    ours = inspect.signature(BatchAugment).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    by_place = {name for name, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
    assert by_place == set(theirs)


def test_arguments_by_place() -> None:
    ours = BatchAugment(0.8, 1.0, (0.2, 0.8), 0.7, 0.3, "pair", False, 0.2, K, True)
    given = {"mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": (0.2, 0.8), "mixup_prob": 0.7, "mixup_switch_prob": 0.3,
             "mixup_mode": "pair", "correct_lam": False}  # fmt: skip
    assert asdict(ours.recipe) == asdict(Recipe(**given))
    assert (ours.smoothing, ours.num_classes, ours.multi_label) == (0.2, K, True)
    with pytest.raises(TypeError, match="positional"):
        BatchAugment(0.8, 1.0, None, 1.0, 0.5, "batch", True, 0.1, K, False, MEAN)


@pytest.mark.parametrize("pair", [tuple, list])
def test_a_pair_is_taken_as_torchvision_takes_it(pair: type) -> None:
    expected = BatchAugment(**BOTH, **PIXELS)(IMAGES, LABELS)
    assert same(BatchAugment(**BOTH, **PIXELS)(pair((IMAGES, LABELS))), expected)
    assert len(v2.MixUp(num_classes=K)(pair((FLOATS, LABELS)))) == 2


@pytest.mark.parametrize("images", [IMAGES, FLOATS], ids=["uint8", "float"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_dense_labels(images: Tensor, multi_label: bool) -> None:
    """One-hots of any dtype are mixed like class numbers, probabilities by the same weights."""
    options = BOTH | PIXELS | {"mode": "elem", "multi_label": multi_label}
    hot = torch.nn.functional.one_hot(LABELS, K)
    if not multi_label:
        expected = BatchAugment(**options)(images, LABELS)
        for dtype in (torch.int64, torch.bool, torch.float16):
            result = BatchAugment(**options)(images, hot.to(dtype))
            assert torch.equal(result[0], expected[0])
            torch.testing.assert_close(result[1], expected[1], rtol=0, atol=1e-6)
    soft = torch.rand(B, K, generator=torch.Generator().manual_seed(0))
    plan = draws(**options)
    for eps in (0.0, 0.1):
        _, targets = BatchAugment(**options, label_smoothing=eps)(images, soft)
        own = (1 - eps) * soft + eps * (0.5 if multi_label else 1 / K)
        lam = plan.lam[:, None]
        torch.testing.assert_close(targets, lam * own + (1 - lam) * own.flip(0), rtol=0, atol=1e-6)
    kept, evaluated = soft.clone(), BatchAugment(**options).eval()(images, soft)[1]
    assert torch.equal(evaluated, soft) and torch.equal(kept, soft)


def test_dense_targets_are_timms() -> None:
    timm_mixup = pytest.importorskip("timm.data.mixup")
    soft = torch.rand(B, K, generator=torch.Generator().manual_seed(1))
    for seed in range(4):
        options = {"mixup_alpha": 0.8, "num_classes": K, "multi_label": True, "label_smoothing": 0.2}
        lam = float(draws(seed=seed, **options).lam[0])
        ours = BatchAugment(seed=seed, **options)(FLOATS, soft)[1]
        torch.testing.assert_close(ours, timm_mixup.mixup_target(soft, K, lam, 0.2, True), rtol=0, atol=1e-6)


def test_lambda_as_drawn() -> None:
    """Without correct_lam the boxes are the same; lambda is what their sides were made of, 1 where there is none."""
    options = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "mode": "elem", "num_classes": K}
    different = 0
    for seed in range(8):
        corrected, drawn = (draws(seed=seed, correct_lam=correct, **options) for correct in (True, False))
        y, x, h, w = corrected.cut.unbind(1)
        assert torch.equal(corrected.cut, drawn.cut)
        torch.testing.assert_close(corrected.lam, 1 - (h * w) / (H * W), rtol=0, atol=1e-6)
        inner = (h * w > 0) & (y > 0) & (x > 0) & (y + h < H) & (x + w < W)
        half = (H * (1 - drawn.lam.double()).sqrt() + 1e-5).long() // 2  # lambda is rounded to fp32
        assert torch.equal(2 * half[inner], h[inner].long()) and (drawn.lam[h * w == 0] == 1).all()
        different += ((corrected.lam - drawn.lam).abs() > 0.1).sum()
    assert different > 8


def test_mixing_can_be_switched_off_like_timms() -> None:
    mix = BatchAugment(**BOTH, **PIXELS, hflip=1.0)
    mix.mixup_enabled = False
    images, targets = mix(IMAGES, LABELS)
    torch.testing.assert_close(images, FLOATS.flip(-1), rtol=0, atol=1e-5)
    assert targets.max() == pytest.approx(0.92) and ((targets > 0.5).sum(1) == 1).all()  # smoothed, as timm's
    mix.mixup_enabled = True
    assert not torch.allclose(mix(IMAGES, LABELS)[0], FLOATS.flip(-1), atol=1e-2)


# ---- draws ----


def test_it_augments_as_the_train_loader_does() -> None:
    split = Split(random_images(40, H, W), torch.arange(40) % K)
    recipe = Recipe(mixup=0.8, cutmix=1.0, mixup_mode="elem", **FULL)
    loader = TrainLoader(split, recipe, MEAN, STD, K, 8, data_seed=7, smoothing=0.1, size=18)
    ours = BatchAugment(**BOTH, **PIXELS, **FULL, mode="elem", seed=7, size=18)
    for epoch in (0, 3):
        ours.set_epoch(epoch)
        order = loader.plan(epoch).index
        for step, expected in enumerate(loader.epoch(epoch)):
            rows = order[8 * step : 8 * step + 8]
            assert same(ours(split.images[rows], split.labels[rows]), expected)


def test_every_call_epoch_and_seed_has_draws_of_its_own() -> None:
    mix = BatchAugment(**BOTH, **PIXELS, mode="elem")
    calls = [mix(IMAGES, LABELS)[1] for _ in range(20)]  # more than are drawn at once
    mix.set_epoch(1)
    calls.append(mix(IMAGES, LABELS)[1])
    calls.append(BatchAugment(**BOTH, **PIXELS, mode="elem", seed=1)(IMAGES, LABELS)[1])
    assert len(torch.stack(calls).unique(dim=0)) == 22
    again = BatchAugment(**BOTH, **PIXELS, mode="elem")
    assert torch.equal(again(IMAGES, LABELS)[1], calls[0])


def test_a_saved_state_continues_where_it_was() -> None:
    sizes = (12, 12, 7, 12, 1, 12)  # batches of changing size take positions that are free
    mix = BatchAugment(**BOTH, **PIXELS, mode="elem", seed=4)
    mix.set_epoch(2)
    states, results = [], []
    for size in sizes:
        states.append(mix.state_dict())
        results.append(mix(IMAGES[:size], LABELS[:size]))
    for step, state in enumerate(states):
        resumed = BatchAugment(**BOTH, **PIXELS, mode="elem")
        resumed.load_state_dict(state)
        assert all(same(resumed(IMAGES[:n], LABELS[:n]), result) for n, result in zip(sizes[step:], results[step:]))
    taken = [state["_extra_state"]["position"] for state in states]
    assert all(b - a >= n for a, b, n in zip(taken, taken[1:], sizes))


@pytest.mark.parametrize("images", [IMAGES, FLOATS], ids=["uint8", "float"])
def test_the_global_generator_is_left_alone(images: Tensor) -> None:
    before = torch.get_rng_state()
    BatchAugment(**BOTH, **PIXELS, reprob=0.5)(images, LABELS)
    assert torch.equal(before, torch.get_rng_state())


# ---- evaluation ----


def test_evaluation_only_normalises() -> None:
    mix = BatchAugment(**BOTH, **PIXELS, **FULL, mode="elem", size=(14, 12)).eval()
    images, targets = mix(IMAGES, LABELS)
    torch.testing.assert_close(images, FLOATS[:, :, 3:17, 2:14], rtol=0, atol=1e-5)
    assert torch.equal(targets, torch.nn.functional.one_hot(LABELS, K).float())
    assert mix.position == 0  # evaluation between two steps must not change the second
    same_size = BatchAugment(**BOTH, **FULL).eval()
    assert same(same_size(FLOATS, LABELS), (FLOATS, targets))


# ---- inputs ----


@pytest.mark.parametrize("images", [IMAGES.permute(0, 2, 3, 1).contiguous(), tv_tensors.Image(IMAGES)])
def test_layouts_and_label_dtypes(images: Tensor) -> None:
    options = BOTH | PIXELS | FULL
    expected = BatchAugment(**options)(IMAGES, LABELS)
    for labels in (LABELS, LABELS.int(), LABELS.to(torch.uint8)):
        result = BatchAugment(**options)(images, labels)
        assert same(result, expected) and type(result[0]) is Tensor


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_batch_size(count: int) -> None:
    for images in (IMAGES, FLOATS):
        mix = BatchAugment(**BOTH, **PIXELS)
        for _ in range(2):
            result, targets = mix(images[:count], LABELS[:count])
            assert result.shape == (count, 3, H, W) and targets.shape == (count, K)
            torch.testing.assert_close(targets.sum(1), torch.ones(count))


def test_dtype_and_memory_format() -> None:
    bf16 = {"dtype": torch.bfloat16}
    for images, options, dtype in ((IMAGES, {}, torch.float32), (IMAGES, bf16, torch.bfloat16),
                                   (FLOATS.half(), {}, torch.float16), (FLOATS, bf16, torch.bfloat16)):
        result, targets = BatchAugment(**BOTH, **PIXELS, **options, channels_last=True)(images, LABELS)
        assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)
        assert targets.dtype == torch.float32


def test_floats_are_erased_and_mixed_like_pixels() -> None:
    options = BOTH | {"mode": "elem", "reprob": 0.9, "recount": 2, "seed": 5}
    theirs = BatchAugment(**options, **PIXELS, backend="reference")(IMAGES, LABELS)
    ours = BatchAugment(**options)(FLOATS, LABELS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(ours[0], BatchAugment(**options | {"reprob": 0.0})(FLOATS, LABELS)[0])


def test_the_op_serves_pixels() -> None:
    with record() as served:
        BatchAugment(**BOTH, **PIXELS, backend="reference")(IMAGES, LABELS)
    assert served == {"augment": "reference"}


@pytest.mark.parametrize("call, error, words", [
    (lambda: BatchAugment(num_classes=K)(IMAGES, LABELS), ValueError, "mean= and std="),
    (lambda: BatchAugment(num_classes=K, hflip=0.5)(FLOATS, LABELS), ValueError, "hflip.* need uint8"),
    (lambda: BatchAugment(num_classes=K, reprob=0.5)(FLOATS[:, :1], LABELS), ValueError, "erasing"),
    (lambda: BatchAugment(num_classes=K, size=8)(FLOATS, LABELS), ValueError, "keep their size"),
    (lambda: BatchAugment(num_classes=4)(FLOATS, LABELS), ValueError, r"labels must be in \[0, 3\]"),
    (lambda: BatchAugment(num_classes=4, **PIXELS)(IMAGES, LABELS), ValueError, r"labels must be in \[0, 3\]"),
    (lambda: BatchAugment(num_classes=K)(IMAGES.int(), LABELS), TypeError, "must be uint8, or float"),
    (lambda: BatchAugment(num_classes=K)(FLOATS[0], LABELS), ValueError, "four dimensions"),
    (lambda: BatchAugment(num_classes=K)(FLOATS, LABELS[:3]), ValueError, r"shape \(12,\), got \(3,\)"),
    (lambda: BatchAugment(num_classes=K)(FLOATS, torch.rand(B)), TypeError, r"integer dtype.*\(12, 5\)"),
    (lambda: BatchAugment(num_classes=K)(FLOATS, LABELS > 2), TypeError, "integer dtype, got torch.bool"),
    (lambda: BatchAugment(num_classes=K)(FLOATS, torch.rand(B, 4)), ValueError, r"= \(12, 5\), got \(12, 4\)"),
    (lambda: BatchAugment(num_classes=K, multi_label=True)(FLOATS, LABELS), ValueError, r"multi_label .*got \(12,\)"),
    (lambda: BatchAugment(num_classes=K)(FLOATS, torch.zeros(B, dtype=torch.complex64)), TypeError, "complex"),
    (lambda: BatchAugment(num_classes=K)(FLOATS, [0] * B), TypeError, "two tensors"),
    (lambda: BatchAugment(num_classes=K)(FLOATS), TypeError, "two tensors.*and NoneType"),
    (lambda: BatchAugment(num_classes=K)((FLOATS, LABELS, LABELS)), TypeError, "two tensors.*got tuple"),
    (lambda: BatchAugment(num_classes=K)((FLOATS, LABELS), LABELS), TypeError, "two tensors.*got tuple"),
    (lambda: BatchAugment(alternating_flip=True), TypeError, "'alternating_flip'.*crop_pad"),
    (lambda: BatchAugment(mixup=0.5), TypeError, "'mixup'"),
    (lambda: BatchAugment(mode="row"), ValueError, "mixup_mode"),
    (lambda: BatchAugment(hflip=1.5), ValueError, "hflip"),
])  # fmt: skip
def test_what_does_not_fit_is_named(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()


# ---- workers ----


def worker_loader(mix: BatchAugment, **options) -> DataLoader:
    pairs = [(IMAGES[i], LABELS[i]) for i in range(B)] * 4

    def collate(batch):
        return mix(*torch.utils.data.default_collate(batch))

    return DataLoader(pairs, batch_size=B, collate_fn=collate, num_workers=2, multiprocessing_context="fork", **options)


def test_workers_draw_each_their_own_numbers_again_and_again() -> None:
    mix = BatchAugment(**BOTH, **PIXELS, mode="elem", reprob=0.5)
    torch.manual_seed(3)
    loader = worker_loader(mix)
    epochs = [list(loader) for _ in range(2)]
    targets = torch.stack([targets for epoch in epochs for _, targets in epoch])
    assert len(targets.unique(dim=0)) == 8  # two workers, two batches each, two epochs
    torch.manual_seed(3)
    assert all(same(a, b) for a, b in zip(worker_loader(mix), epochs[0], strict=True))


def test_kernels_are_refused_in_workers() -> None:
    """In the main process the automatic order takes the kernel; in a worker it steps down, and by name it raises."""
    for mix in (BatchAugment(**BOTH, **PIXELS, backend="cpu"), BatchAugment(**BOTH, **PIXELS)):
        refused = pytest.raises(BackendError, match="worker process.*Usable here")
        with use_backend(None if mix.backend else "cpu"), refused:
            next(iter(worker_loader(mix)))


def test_recipes_fields_are_its_arguments() -> None:
    mix = BatchAugment(**BOTH, **FULL, cutmix_minmax=[0.2, 0.8], correct_lam=False, prob=0.7,
                       switch_prob=0.3, mode="pair")
    given = {"mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": (0.2, 0.8), "mixup_prob": 0.7, "mixup_switch_prob": 0.3,
             "mixup_mode": "pair", "correct_lam": False}  # fmt: skip
    assert asdict(mix.recipe) == asdict(Recipe(**FULL, **given))
