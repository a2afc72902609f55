"""Sampling of augmentation plans: pure functions of (seed, epoch, position), and their distributions.

The statistics use fixed seeds and 40,000 samples; a test fails below p = 1e-4, so that a wrong range, a swapped axis
or a reused random word shows and chance does not.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from deit_fast.data import draw as draws
from deit_fast.data.augmentation import Plan, Recipe, epoch_order, neutral_plan, sample_plan
from deit_fast.ops.augment_values import check_values
from needs import needs_gpu
from tape import Tape

N = 40_000
FULL = Recipe(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.3, saturation=0.2, reprob=0.6, recount=2, mixup=0.8,
              cutmix=1.0, mixup_prob=0.9, mixup_mode="elem")
RESIZED = replace(FULL, rrc=True, interpolation="random", vflip=0.3, hue=0.1, grayscale=0.2)
P_MIN = 1e-4


def draw(recipe: Recipe, n: int = N, batch_size: int = 64, size=32, **kw) -> Plan:
    return sample_plan(recipe, torch.arange(n), kw.pop("seed", 3), kw.pop("epoch", 1), batch_size, size, **kw)


def assert_equal(a: Plan, b: Plan) -> None:
    for name, tensor in a.tensors().items():
        assert tensor.dtype == b.tensors()[name].dtype and torch.equal(tensor, b.tensors()[name]), name
    assert (a.remode, a.padding_mode) == (b.remode, b.padding_mode)


def assert_uniform(values: torch.Tensor, low: int, high: int) -> None:
    """Integers in [low, high], all equally likely."""
    assert values.min() >= low and values.max() <= high
    counts = torch.bincount((values - low).long(), minlength=high - low + 1)
    assert stats.chisquare(counts).pvalue > P_MIN, counts


def assert_rate(hits: torch.Tensor, p: float) -> None:
    assert stats.binomtest(int(hits.sum()), hits.numel(), p).pvalue > P_MIN, (hits.float().mean(), p)


# ---- purity ----

@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("full", [FULL, RESIZED, replace(RESIZED, alternating_flip=True)])
def test_epoch_sliced_equals_batches_alone(full: Recipe, mode: str, batch_size: int) -> None:
    recipe, order = replace(full, mixup_mode=mode), epoch_order(150, 5, 2)  # 150: the last batch is short, odd for 7
    epoch = sample_plan(recipe, order, 5, 2, batch_size, (32, 24))
    for start in range(0, 150, batch_size):
        rows = slice(start, start + batch_size)
        alone = sample_plan(recipe, order[rows], 5, 2, batch_size, (32, 24), first_position=start)
        assert_equal(epoch[rows], alone)


@pytest.mark.parametrize(("recipe", "unused"), [(FULL, "resized_crop bicubic vflip grayscale"), (RESIZED, "crop")])
def test_another_epoch_or_seed_is_another_plan(recipe: Recipe, unused: str) -> None:
    base = draw(recipe, 512)
    for other in (draw(recipe, 512, epoch=2), draw(recipe, 512, seed=4), draw(recipe, 512, seed=3 + 2**32)):
        for name in set(base.tensors()) - {"index", *unused.split()}:
            assert not torch.equal(base.tensors()[name], other.tensors()[name]), name


@needs_gpu
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("full", [FULL, RESIZED])
def test_devices_agree(full: Recipe, mode: str) -> None:
    recipe = replace(full, mixup_mode=mode)
    assert_equal(draw(recipe), draw(recipe, device="cuda").to("cpu"))


def every_draw(n: int = 12_800) -> dict[str, torch.Tensor]:
    """One column per random decision of positions 0 to n - 1, by what it says, monotone in its word and of mean
    independent of the others; from as many plans of one seed and epoch as it takes to see each.
    """
    def values(**recipe) -> Plan:
        return draw(Recipe(**recipe, mixup_mode="elem"), n, epoch=0)

    def box(name: str, boxes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Area, aspect ratio and place of boxes (n, 4) in 32 x 32, all 0 where there is none."""
        y, x, h, w = boxes.double().unbind(1)
        some = h * w > 0
        place = [torch.where(side < 32, at / (32 - side).clamp(min=1), 0.5) for at, side in ((y, h), (x, w))]
        columns = (h * w, (h / w).log(), *place)
        return {f"{name} {what}": torch.where(some, column - column[some].mean(), 0.0)
                for what, column in zip(("area", "aspect", "y", "x"), columns)}

    plan = values(crop_pad=4, hflip=0.5, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, vflip=0.3,
                  grayscale=0.2, reprob=1.0, mixup=0.8)
    three = plan.jitter_order[plan.jitter_order != 3].view(n, 3).long() @ torch.tensor([9, 3, 1])
    columns = {"crop y": plan.crop[:, 0], "crop x": plan.crop[:, 1], "flip": plan.flip, "vflip": plan.vflip,
               "grayscale": plan.grayscale, "order": three, "hue's place": (plan.jitter_order == 3).long().argmax(1),
               "lambda": plan.lam, "noise key, low": plan.noise_key & 0xFFFFFFFF,
               "noise key, high": plan.noise_key >> 32 & 0xFFFFFFFF, **box("erase", plan.erase[:, 0])}
    columns |= {f"jitter {kind}": factors for kind, factors in enumerate(plan.jitter.unbind(1))}
    columns["order of the epoch"] = epoch_order(n, 3, 0).argsort()
    plan = values(hflip=0.5, alternating_flip=True, reprob=1.0, recount=2)
    columns |= {"first flip": plan.flip, "erase count": plan.erase[:, 1, 2] > 0, **box("erase 2", plan.erase[:, 1])}
    plan = values(rrc=True, interpolation="random", reprob=0.5, mixup=0.8, mixup_prob=0.7)
    columns |= {**box("resized", plan.resized_crop), "bicubic": plan.bicubic, "whether erased": plan.erase[:, 0, 2] > 0,
                "whether mixed": plan.partner != torch.arange(n) % 64}
    plan = values(mixup=0.8, cutmix_minmax=(0.25, 0.75), mixup_switch_prob=0.4)
    columns["CutMix"] = plan.cut[:, 2] > 0
    y, x, h, w = values(cutmix_minmax=(0.25, 0.75)).cut.double().unbind(1)
    columns |= {"cut y": y / (32 - h), "cut x": x / (32 - w), "cut h": h, "cut w": w}
    return {name: column.double() for name, column in columns.items()}


def test_draws_do_not_share_random_words() -> None:
    """Not even those of recipes that exclude each other, crop and resized crop: all are uncorrelated, pair by pair."""
    columns = every_draw()
    correlation = torch.corrcoef(torch.stack(list(columns.values()))).fill_diagonal_(0).abs()
    names, most = list(columns), int(correlation.argmax())
    pair = f"{names[most // len(names)]} and {names[most % len(names)]}"
    assert correlation.max() < 5 / math.sqrt(12_800), (pair, correlation.max())


@pytest.mark.parametrize(("field", "words_of"), [
    ("SWITCHES", "GEOMETRY"), ("RESIZE", "GEOMETRY"), ("RESIZE_TRIES", "TRIES"), ("SWITCHES", "ERASE")])
def test_shared_words_are_seen(monkeypatch: pytest.MonkeyPatch, field: str, words_of: str) -> None:
    """The test above can fail."""
    monkeypatch.setattr(draws, field, getattr(draws, words_of))
    with pytest.raises(AssertionError, match=" and "):
        test_draws_do_not_share_random_words()


SEEN_FIRST = "index crop flip jitter_order jitter erase partner lam cut".split()
SEEN_LATER = "resized_crop bicubic flip vflip jitter_order jitter grayscale noise_key lam cut".split()


@pytest.mark.parametrize(("recipe", "names", "total"), [
    (FULL, SEEN_FIRST, -61525.267183549535),
    (replace(RESIZED, mixup_mode="pair", cutmix_minmax=(0.2, 0.8)), SEEN_LATER, 34962.36381630022),
    (replace(RESIZED, alternating_flip=True, correct_lam=False), SEEN_LATER, 34924.110841568516)])
def test_plans_of_before_stay_the_same(recipe: Recipe, names: list[str], total: float) -> None:
    """Fields keep their counters and tables when others come: the sums are of what they gave before."""
    plan = draw(recipe, 64, size=(32, 24))
    plan = replace(plan, noise_key=plan.noise_key & 0xFFFF)  # a whole key would hide the rest of the sum
    values = torch.cat([getattr(plan, name).double().flatten() for name in names])
    weights = torch.arange(1, len(values) + 1, dtype=torch.float64).sin()
    assert (values @ weights).item() == pytest.approx(total, rel=1e-12)


def test_hue_changes_no_other_draw() -> None:
    plan, hue = (draw(recipe, 64, size=(32, 24)) for recipe in (FULL, replace(FULL, hue=0.1)))
    assert torch.equal(hue.jitter[:, :3], plan.jitter)
    assert torch.equal(hue.jitter_order[hue.jitter_order != 3].view(64, 3), plan.jitter_order)


@pytest.mark.parametrize("recipe", [
    Recipe(), Recipe(crop_pad=4, hflip=0.5), Recipe(hflip=0.5, alternating_flip=True), Recipe(rrc=True),
    Recipe(vflip=0.5, grayscale=0.5), Recipe(brightness=0.4), Recipe(hue=0.1), Recipe(reprob=0.5),
    Recipe(reprob=0.5, remode="rand", recount=3), Recipe(mixup=0.8), Recipe(cutmix=1.0, mixup_mode="pair"),
    Recipe(cutmix_minmax=(0.2, 0.8), mixup_mode="elem"), FULL, RESIZED])
def test_sampling_can_be_captured(recipe: Recipe) -> None:
    """Nothing is read on the host or copied from it, as a CUDA graph and asynchronous launches want it."""
    with Tape():
        plan = draw(recipe, 14, 7)
    assert_equal(plan, draw(recipe, 14, 7))


def test_recipe_that_draws_nothing_is_neutral() -> None:
    plan = sample_plan(Recipe(), torch.arange(64), 0, 0, 64, 32)
    assert_equal(plan, neutral_plan(torch.arange(64)))


# ---- geometry and color ----

def test_crop_and_flip() -> None:
    plan = draw(replace(FULL, hflip=0.3))
    assert_uniform(plan.crop[:, 0], -4, 4)
    assert_uniform(plan.crop[:, 1], -4, 4)
    assert_rate(plan.flip, 0.3)


def test_crop_of_a_larger_source() -> None:
    plan = draw(Recipe(crop_pad=1), size=(24, 28), source_size=(32, 30))
    assert_uniform(plan.crop[:, 0], -1, 32 - 24 + 1)
    assert_uniform(plan.crop[:, 1], -1, 30 - 28 + 1)
    with pytest.raises(ValueError, match="images of 20x20, padded by 1, are smaller than the crop 24x24"):
        draw(Recipe(crop_pad=1), 4, size=24, source_size=20)


def test_color_jitter() -> None:
    plan = draw(replace(FULL, saturation=1.5))
    code = plan.jitter_order.long() @ torch.tensor([9, 3, 1])
    values, counts = code.unique(return_counts=True)
    assert len(values) == 6 and stats.chisquare(counts).pvalue > P_MIN
    for column, (low, high) in zip(plan.jitter.unbind(1), ((0.6, 1.4), (0.7, 1.3), (0.0, 2.5))):
        factors = column.double() / 65536
        assert low - 1e-5 <= factors.min() and factors.max() <= high + 1e-5
        assert stats.kstest(factors.numpy(), "uniform", (low, high - low)).pvalue > P_MIN
    assert (draw(Recipe(contrast=0.4)).jitter[:, [0, 2]] == 65536).all()


def test_hue_joins_the_order() -> None:
    plan = draw(replace(FULL, hue=0.2))
    code = plan.jitter_order.long() @ torch.tensor([64, 16, 4, 1])
    values, counts = code.unique(return_counts=True)
    assert len(values) == 24 and stats.chisquare(counts).pvalue > P_MIN
    assert (plan.jitter_order.sort(1).values == torch.arange(4)).all()
    turns = plan.jitter[:, 3].double() / 65536
    assert turns.abs().max() <= 0.2 + 1e-5
    assert stats.kstest(turns.numpy(), "uniform", (-0.2, 0.4)).pvalue > P_MIN
    most = draw(Recipe(hue=0.5)).jitter
    assert most[:, 3].abs().max() <= 32768 and (most[:, :3] == 65536).all()
    assert draw(Recipe(contrast=0.5)).jitter.shape == (N, 3)


def test_switches() -> None:
    plan = draw(Recipe(vflip=0.3, grayscale=0.2))
    assert_rate(plan.vflip, 0.3)
    assert_rate(plan.grayscale, 0.2)
    assert_rate(plan.vflip & plan.grayscale, 0.06)
    assert not plan.flip.any() and not draw(Recipe(vflip=1.0)).grayscale.any()


def test_alternating_flip() -> None:
    """airbench's: a side by chance in the first epoch, the other one in every next; it belongs to the image."""
    recipe = Recipe(hflip=0.3, alternating_flip=True)
    first = draw(recipe, epoch=0).flip
    assert_rate(first, 0.3)
    assert torch.equal(draw(recipe, epoch=1).flip, ~first) and torch.equal(draw(recipe, epoch=4).flip, first)
    order = epoch_order(N, 3, 2)
    assert torch.equal(sample_plan(recipe, order, 3, 2, 64, 32).flip, first[order])
    assert not torch.equal(draw(recipe, epoch=0, seed=4).flip, first)
    assert not draw(Recipe(alternating_flip=True)).flip.any()


# ---- resized crops ----

def torchvision_boxes(n: int, H: int, W: int, scale, ratio) -> torch.Tensor:
    """(n, 4) boxes (y, x, h, w) by torchvision's own sampling."""
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty((1, H, W))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)])


@pytest.mark.parametrize(("H", "W", "scale", "ratio"), [
    (64, 64, (0.08, 1.0), (3 / 4, 4 / 3)), (48, 100, (0.5, 1.0), (0.9, 1.1)), (300, 20, (0.08, 1.0), (3 / 4, 4 / 3)),
    (40, 400, (0.3, 1.0), (0.5, 2.0))])
def test_resized_crop_boxes(H: int, W: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Against torchvision's get_params; the last two shapes often need the central crop."""
    boxes = draw(Recipe(rrc=True, scale=scale, ratio=ratio), 12_000, size=32, source_size=(H, W)).resized_crop.long()
    theirs = torchvision_boxes(4_000, H, W, scale, ratio)
    y, x, h, w = boxes.unbind(1)
    assert (boxes >= 0).all() and (h > 0).all() and (w > 0).all() and (y + h <= H).all() and (x + w <= W).all()
    for name, of in {"area": lambda b: b[:, 2] * b[:, 3], "aspect": lambda b: b[:, 2] / b[:, 3],
                     "y": lambda b: b[:, 0], "x": lambda b: b[:, 1]}.items():
        assert stats.ks_2samp(of(boxes).numpy(), of(theirs).numpy()).pvalue > P_MIN, name
    central = theirs[(theirs[:, 0] == (H - theirs[:, 2]) // 2) & (theirs[:, 1] == (W - theirs[:, 3]) // 2)]
    if H / W > 4 or W / H > 4:
        fallback = central.mode(0).values
        rates = [[(b == fallback).all(1).sum().item(), (b != fallback).any(1).sum().item()] for b in (boxes, theirs)]
        assert stats.fisher_exact(rates).pvalue > P_MIN


def test_interpolation_is_drawn() -> None:
    assert_rate(draw(Recipe(rrc=True, interpolation="random")).bicubic, 0.5)
    assert draw(Recipe(rrc=True)).bicubic.all() and not draw(Recipe(rrc=True, interpolation="bilinear")).bicubic.any()
    assert draw(FULL, 64).resized_crop.shape == (0, 4)


def test_geometry_of_workers_is_left_out() -> None:
    plan = draw(replace(RESIZED, padding_mode="reflect"), 64)
    rest = plan.without_geometry()
    assert len(rest.resized_crop) == 0 and not (rest.flip | rest.vflip).any() and (rest.crop == 0).all()
    for name in ("index", "jitter_order", "jitter", "grayscale", "erase", "noise_key", "partner", "lam", "cut"):
        assert torch.equal(getattr(rest, name), getattr(plan, name)), name


# ---- erasing: point 19 ----

def timm_boxes(n: int, H: int, W: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """(n, 3) area, log aspect, top of boxes by ten tries in a loop; zeros where none fitted."""
    found = np.zeros((n, 3))
    for row in found:
        for _ in range(10):
            area = generator.uniform(0.02, 1 / 3) * H * W / count
            aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
            if h < H and w < W:
                row[:] = h * w, math.log(h / w), generator.integers(0, H - h + 1)
                break
    return found


@pytest.mark.parametrize(("H", "W"), [(32, 32), (12, 48)])
def test_erasing_boxes(H: int, W: int) -> None:
    boxes = draw(Recipe(reprob=1.0), size=(H, W)).erase[:, 0].double()
    y, x, h, w = boxes.unbind(1)
    assert (y + h <= H).all() and (x + w <= W).all() and (boxes >= 0).all() and (h < H).all() and (w < W).all()
    expected = timm_boxes(N, H, W, 1, np.random.default_rng(0))
    used = h > 0
    assert_rate(used, max(min((expected[:, 0] > 0).mean(), 1 - 1e-4), 1e-4))
    expected = expected[expected[:, 0] > 0]
    for ours, theirs in ((h * w, expected[:, 0]), ((h / w).log(), expected[:, 1]), (y, expected[:, 2])):
        assert stats.ks_2samp(ours[used].numpy(), theirs).pvalue > P_MIN
    assert (x + w == W).any() and (y + h == H).any() and (x == 0).any()


def test_erasing_rate_and_count() -> None:
    used = draw(Recipe(reprob=0.25, recount=3)).erase[..., 2] > 0  # (N, 3)
    assert_rate(used[:, 0], 0.25)
    count = used[used[:, 0]].sum(1)
    assert_uniform(count, 1, 3)
    areas = draw(Recipe(reprob=1.0, recount=3)).erase[:, 0]
    assert (areas[:, 2] * areas[:, 3]).max() <= 32 * 32 / 3 + 32
    assert (draw(Recipe(reprob=1.0), size=1).erase == 0).all()  # nothing is smaller than one pixel: untouched


def test_noise_keys_differ() -> None:
    assert len(draw(Recipe(reprob=1.0)).noise_key.unique()) == N


# ---- order of an epoch: points 27, 28 ----

def test_epoch_order() -> None:
    order = epoch_order(1000, 7, 0)
    assert order.sort().values.equal(torch.arange(1000)) and not order.equal(torch.arange(1000))
    assert not order.equal(epoch_order(1000, 7, 1)) and not order.equal(epoch_order(1000, 8, 0))
    assert order.equal(epoch_order(1000, 7, 0))
    places = torch.stack([epoch_order(10, seed, 0) for seed in range(4000)])
    for column in places.unbind(1):
        assert_uniform(column, 0, 9)


@pytest.mark.parametrize("n", [1, 100, 255, 1000])
def test_repeated_augmentation(n: int) -> None:
    order = epoch_order(n, 7, 0, repeats=3)
    assert len(order) == n and len(order.unique()) == math.ceil(n / 3)
    assert torch.equal(order, epoch_order(n, 7, 0).repeat_interleave(3)[:n])
    plan = sample_plan(FULL, order, 7, 0, 64, 32)
    assert n < 100 or not torch.equal(plan.crop[0], plan.crop[1]) or not torch.equal(plan.jitter[0], plan.jitter[1])
    if n == 1000:  # copies of one image meet only in the middle of a batch
        batch = plan[:64]
        assert (batch.index[batch.partner] == batch.index)[batch.partner != torch.arange(64)].sum() <= 2


# ---- ranges and refusals ----

@pytest.mark.parametrize(("H", "W"), [(1, 1), (2, 3), (28, 28), (17, 96), (224, 224)])
@pytest.mark.parametrize("minmax", [None, (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("rrc", [False, True])
def test_plans_are_in_range(H: int, W: int, minmax, rrc: bool) -> None:
    recipe = replace(FULL, crop_pad=min(H, W), brightness=63.0, hue=0.5, reprob=1.0, cutmix_minmax=minmax, rrc=rrc)
    plan = draw(recipe, 999, size=(H, W))
    images, labels = torch.zeros((999, 3, H, W), dtype=torch.uint8), torch.zeros(999, dtype=torch.int64)
    for batch in (plan[slice(k, k + 64)] for k in range(0, 999, 64)):
        check_values(images, labels, list(batch.tensors().values()), 1, H, W)


@pytest.mark.parametrize(("bad", "text"), [
    ({"hflip": 1.5}, "hflip"), ({"brightness": -1}, "brightness"), ({"mixup": -0.1}, "mixup"),
    ({"recount": 0}, "recount"), ({"remode": "noise"}, "remode"), ({"mixup_mode": "half"}, "mixup_mode"),
    ({"cutmix_minmax": (0.5, 0.2)}, "cutmix_minmax"),
    ({"hue": 0.6}, "hue"), ({"grayscale": -0.1}, "grayscale"), ({"vflip": 2}, "vflip"),
    ({"scale": (0.5, 0.1)}, "scale"),
    ({"scale": (0.0, 1.0)}, "scale"), ({"ratio": (2.0, 1.0)}, "ratio"), ({"padding_mode": "edge"}, "padding_mode"),
    ({"interpolation": "nearest"}, "interpolation"),
    ({"crop_pad": -1}, "crop_pad"), ({"reprob": float("nan")}, "reprob")])
def test_recipes_are_refused_by_name(bad: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"Recipe: {text} must be"):
        Recipe(**bad)


def test_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="first_position must start a batch of 64, got 3"):
        draw(FULL, 64, first_position=3)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        draw(FULL, 64, batch_size=0)
    with pytest.raises(ValueError, match="repeats must be 1 or more"):
        epoch_order(10, 0, 0, repeats=0)
    with pytest.raises(TypeError, match="cut by slices"):
        draw(FULL, 64)[3]
