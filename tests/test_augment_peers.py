"""The reference of `augment` against torchvision's functional ops, timm's and torchvision's mixing; its statistics.

Crop, flip, erasing and mixing equal the peers' with the same parameters; each color operation and bilinear resizing are
within one uint8 level of torchvision's, bicubic resizing within two (ours is fixed point, and rounds once).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from augment_plans import MEAN, STD, boxes, random_images
from deit_fast.data.augmentation import Plan, neutral_plan
from deit_fast.reference.augment import augment, erase, grayscale, jitter, noise
from deit_fast.reference.geometry import geometry, weights

B, H, W = 12, 32, 28


def plan_of(**changes) -> Plan:
    return replace(neutral_plan(torch.arange(B)), **changes)


def normalised(images: Tensor) -> Tensor:
    return TF.normalize(TF.to_dtype(images, torch.float32, scale=True), MEAN, STD)


# ---- torchvision ----

def test_neutral_plan_normalises() -> None:
    images = random_images(B, H, W)
    for source in (images, images.permute(0, 2, 3, 1).contiguous()):
        x, t = augment(source, torch.arange(B) % 5, plan_of(), MEAN, STD, 5)
        torch.testing.assert_close(x, normalised(images), rtol=0, atol=1e-6)
        assert torch.equal(t, torch.nn.functional.one_hot(torch.arange(B) % 5, 5).float())


@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
@pytest.mark.parametrize("size", [(32, 28), (20, 21), (40, 36)])
def test_crop_and_flip(size: tuple[int, int], padding_mode: str) -> None:
    images, pad = random_images(B, H, W), 12
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        crop = torch.stack([torch.randint(-pad, have + pad - want + 1, (B,), generator=generator)
                            for have, want in zip((H, W), size)], dim=1).int()
        flip, vflip = torch.rand(2, B, generator=generator) < 0.5
        plan = plan_of(crop=crop, flip=flip, vflip=vflip, padding_mode=padding_mode)
        ours = geometry(images, plan, *size).permute(0, 3, 1, 2)
        for row in range(B):
            y, x = crop[row].tolist()
            theirs = TF.crop(TF.pad(images[row], [pad] * 4, padding_mode=padding_mode), y + pad, x + pad, *size)
            theirs = TF.horizontal_flip(theirs) if flip[row] else theirs
            assert torch.equal(ours[row], TF.vertical_flip(theirs) if vflip[row] else theirs)


def test_reflection_goes_on_beyond_the_image() -> None:
    """Where torchvision refuses to pad by more than the image, numpy's continuation holds; one pixel is repeated."""
    images = random_images(B, 3, 1)
    plan = plan_of(crop=torch.tensor([[-9, -2]] * B, dtype=torch.int32), padding_mode="reflect")
    ours = geometry(images, plan, 20, 5).permute(0, 3, 1, 2).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (9, 8), (2, 2)), mode="reflect")
    assert (ours == padded).all()


SIZES = [((32, 32), (32, 32)), ((28, 28), (384, 384)), ((384, 384), (28, 28)), ((37, 300), (224, 96)),
         ((500, 375), (224, 224)), ((5, 3), (2, 2)), ((1200, 40), (33, 65))]


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(("source", "size"), SIZES)
def test_resized_crop(source: tuple[int, int], size: tuple[int, int], bicubic: bool) -> None:
    """Noise and ramps, boxes of any shape from 2 x 2 up (torch's own kernel fails on sides of 1) to the whole image."""
    images = random_images(6, *source)
    g = torch.Generator().manual_seed(source[0] * size[1])
    sides = torch.stack([torch.randint(2, have + 1, (6,), generator=g) for have in source], dim=1)
    sides[0] = torch.tensor(source)
    corner = ((torch.tensor(source) - sides + 1) * torch.rand(6, 2, generator=g)).long()
    box = torch.cat([corner, sides], dim=1).int()
    flip, vflip = torch.rand(2, 6, generator=g) < 0.5
    plan = replace(neutral_plan(torch.arange(6)), resized_crop=box, bicubic=torch.full((6,), bicubic), flip=flip,
                   vflip=vflip)
    mode = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    for layout in (images, images.permute(0, 2, 3, 1).contiguous()):
        ours = geometry(layout, plan, *size).permute(0, 3, 1, 2)
        for row in range(6):
            theirs = TF.resized_crop(images[row], *box[row].tolist(), list(size), interpolation=mode, antialias=True)
            theirs = TF.horizontal_flip(theirs) if flip[row] else theirs
            difference = (ours[row].int() - (TF.vertical_flip(theirs) if vflip[row] else theirs).int()).abs()
            assert difference.max() <= (2 if bicubic else 1)
            assert difference.float().mean() < 0.5 or min(size) < 28  # they round twice: ties after the first pass


def test_rows_without_a_box_are_cropped() -> None:
    images, crop = random_images(B, H, W), torch.tensor([[2, -3]] * B, dtype=torch.int32)
    box = torch.tensor([[0, 0, 0, 0], [4, 5, 6, 7], [1, 1, 0, 9], [0, 0, H, W]] * (B // 4), dtype=torch.int32)
    ours = geometry(images, plan_of(crop=crop, resized_crop=box), H, W)
    assert torch.equal(ours[::2], geometry(images, plan_of(crop=crop), H, W)[::2])
    assert torch.equal(ours[3::4], geometry(images, plan_of(), H, W)[3::4])  # a box of the output's size is a copy


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 5), (7, 3), (3, 384), (32768, 1), (32768, 28), (500, 224)])
def test_weights_sum_to_one(n: int, size: int, bicubic: bool) -> None:
    """Exactly, so that flat areas stay flat; and they are those of the filter within 2^-13."""
    place = torch.arange(size)[None]
    ours = weights(torch.tensor([0]), torch.tensor([n]), torch.tensor([bicubic]), place, n)[0]  # (size, n)
    assert (ours.sum(1) == 1 << 14).all()
    scale = n / size
    u = ((torch.arange(n) + 0.5) - (place[0, :, None] + 0.5) * scale).abs().double() / max(scale, 1)
    near, far = 1.5 * u**3 - 2.5 * u**2 + 1, -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2
    exact = torch.where(u < 1, near, torch.where(u < 2, far, 0)) if bicubic else (1 - u).clamp(min=0)
    exact = exact / exact.sum(1, keepdim=True)
    assert (ours / 2**14 - exact).abs().max() < 2**-13


ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_color_is_within_one_level(kind: int) -> None:
    images = random_images(B, H, W)
    every = torch.arange(256, dtype=torch.uint8)
    images[0] = torch.stack([every, every.flip(0), every.roll(77)]).repeat(1, 4)[:, :H * W].view(3, H, W)
    worst = 0
    for factor in (0.0, 0.37, 0.6, 0.999, 1.0, 1.001, 1.4, 2.0, 7.3, 63.0):
        factors = torch.full((B, 3), 65536)
        factors[:, kind] = round(factor * 65536)
        ours = jitter(images.permute(0, 2, 3, 1), torch.tensor([[0, 1, 2]] * B, dtype=torch.uint8), factors.int())
        theirs = ADJUST[kind](images, factor).permute(0, 2, 3, 1)
        worst = max(worst, (ours.int() - theirs.int()).abs().max().item())
    assert worst <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (28, 28), (65, 33), (224, 224), (384, 384)])
def test_color_of_any_size(size: tuple[int, int]) -> None:
    """A factor for each image; contrast's mean is of 1 to 147,456 pixels."""
    images = random_images(5, *size, seed=7)
    order, factors = torch.tensor([[1, 2, 0]] * 5, dtype=torch.uint8), (0.0, 0.3, 0.8, 1.7, 5.0)
    for kind, adjust in enumerate(ADJUST):
        fixed = torch.full((5, 3), 65536, dtype=torch.int32)
        fixed[:, kind] = torch.tensor([round(65536 * factor) for factor in factors])
        ours = jitter(images.permute(0, 2, 3, 1), order, fixed).permute(0, 3, 1, 2)
        theirs = torch.stack([adjust(image, factor) for image, factor in zip(images, factors)])
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_hue_is_within_one_level() -> None:
    """Every third level of two channels beside every fifteenth of the third: every sector and its borders."""
    level = torch.arange(0, 256, 3, dtype=torch.uint8)
    wheel = torch.stack(torch.meshgrid(level[::5], level, level, indexing="ij"))  # (3, 18, 86, 86)
    images = torch.stack([wheel.roll(k, 0).reshape(3, -1, 86) for k in range(3)])  # (3, 3, 1548, 86)
    order = torch.tensor([[3, 0, 1, 2]] * 3, dtype=torch.uint8)
    for shift in (-0.5, -1 / 3, -0.07, 0.0, 1 / 65536, 0.25, 0.41, 0.5):
        factors = torch.tensor([[65536, 65536, 65536, round(shift * 65536)]] * 3, dtype=torch.int32)
        ours = jitter(images.permute(0, 2, 3, 1), order, factors).permute(0, 3, 1, 2)
        theirs = TF.adjust_hue(images, shift)
        assert (ours.int() - theirs.int()).abs().max() <= 1
        assert torch.equal(ours, images) if abs(shift) < 1e-4 else (ours != images).float().mean() > 0.1


def test_grayscale() -> None:
    images, chosen = random_images(B, H, W), torch.arange(B) % 3 == 0
    ours = grayscale(images.permute(0, 2, 3, 1), chosen).permute(0, 3, 1, 2)
    theirs = TF.rgb_to_grayscale(images, num_output_channels=3)
    assert (ours.int() - torch.where(chosen[:, None, None, None], theirs, images).int()).abs().max() <= 1
    x, _ = augment(images, torch.zeros(B, dtype=torch.int64), plan_of(
        grayscale=chosen, jitter_order=torch.tensor([[2, 0, 1]] * B, dtype=torch.uint8),
        jitter=torch.tensor([[65536, 65536, 2 * 65536]] * B, dtype=torch.int32)), (0, 0, 0), (1, 1, 1), 1)
    red, green, blue = x.unbind(1)
    assert torch.equal(red[chosen], green[chosen]) and torch.equal(red[chosen], blue[chosen])  # gray comes last
    assert not torch.equal(red[~chosen], green[~chosen])


def test_color_order() -> None:
    """The plan's order is followed: each order is near torchvision's same order, and orders differ."""
    images, factors, shift = random_images(B, H, W), (1.9, 0.4, 2.2), 0.2
    pixels = images.permute(0, 2, 3, 1)
    fixed = torch.tensor([[round(65536 * f) for f in factors]] * B, dtype=torch.int32)
    results = []
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        theirs = images
        for kind in order:
            theirs = ADJUST[kind](theirs, factors[kind])
        ours = jitter(pixels, torch.tensor([order] * B, dtype=torch.uint8), fixed).permute(0, 3, 1, 2)
        assert (ours.int() - theirs.int()).abs().max() <= 6  # a level, times the factors that follow
        assert (ours.int() - theirs.int()).abs().float().mean() < 0.5
        results.append(ours)
    fixed = torch.cat([fixed, torch.full((B, 1), round(65536 * shift), dtype=torch.int32)], dim=1)
    for order in ((0, 1, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0)):
        theirs = images
        for kind in order:
            theirs = TF.adjust_hue(theirs, shift) if kind == 3 else ADJUST[kind](theirs, factors[kind])
        ours = jitter(pixels, torch.tensor([order] * B, dtype=torch.uint8), fixed).permute(0, 3, 1, 2)
        assert (ours.int() - theirs.int()).abs().float().mean() < 0.7
        results.append(ours)
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_erasing() -> None:
    x = torch.randn(B, H, W, 3)
    box = boxes(torch.Generator().manual_seed(1), (B, 1), H, W)
    ours = erase(x, box, torch.zeros(B, dtype=torch.int64), "const").permute(0, 3, 1, 2)
    for row in range(B):
        y, left, h, w = box[row, 0].tolist()
        assert torch.equal(ours[row], TF.erase(x[row].permute(2, 0, 1), y, left, h, w, torch.zeros(1)))


# ---- noise: point 19 ----

def test_noise_is_normal() -> None:
    z = noise(torch.tensor([1, 2, -3, 2**40, 2**63 - 1]), 80, 100)  # (5, 80, 100, 3)
    for channel in z.unbind(-1):
        assert stats.kstest(channel.flatten().numpy(), "norm").pvalue > 1e-4
    flat = z.reshape(-1, 3).double()
    assert (torch.corrcoef(torch.cat([flat.T, flat.T.square()])).fill_diagonal_(0)).abs().max() < 5 / len(flat) ** 0.5
    rows = torch.corrcoef(z.reshape(5, -1))
    assert rows.fill_diagonal_(0).abs().max() < 5 / 24000**0.5
    assert abs(torch.corrcoef(torch.stack([flat[1:, 0], flat[:-1, 0]]))[0, 1]) < 5 / len(flat) ** 0.5


def test_noise_belongs_to_the_pixel() -> None:
    """The same key fills the same pixel alike whatever the box: overlapping boxes need no order."""
    x, key = torch.zeros(1, 8, 8, 3), torch.tensor([99])
    one = erase(x, torch.tensor([[[0, 0, 8, 8]]]), key, "pixel")
    two = erase(x, torch.tensor([[[1, 2, 4, 5], [3, 3, 5, 5]]]), key, "pixel")
    assert torch.equal(two[two != 0], one[two != 0]) and (two == 0).any()


def test_rand_fills_a_box_with_one_normal_color() -> None:
    """timm's mode: a color per box and channel; the last of overlapping boxes counts."""
    x = torch.zeros(4000, 6, 7, 3)
    box = torch.tensor([[0, 0, 4, 5], [2, 3, 4, 4], [0, 6, 0, 1]]).expand(4000, -1, -1)
    out = erase(x, box, torch.arange(4000), "rand")
    first, second = out[:, 0, 0], out[:, 5, 6]  # (4000, 3)
    assert torch.equal(out[:, :2, :5], first[:, None, None].expand(-1, 2, 5, -1))
    assert torch.equal(out[:, 2:, 3:], second[:, None, None].expand(-1, 4, 4, -1))
    assert (out[:, 0, 5:] == 0).all() and (out[:, 5, :3] == 0).all()
    colors = torch.cat([first, second], dim=1)
    assert torch.corrcoef(colors.T).fill_diagonal_(0).abs().max() < 5 / 4000**0.5
    assert stats.kstest(colors.flatten().numpy(), "norm").pvalue > 1e-4


# ---- mixing: points 20 to 24 ----

def mixed_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lam, cuts = torch.rand(B, generator=generator), torch.rand(B, generator=generator) < 0.5
    box = boxes(generator, (B,), H, W) * cuts[:, None]
    area = box[:, 2] * box[:, 3]
    lam = torch.where(cuts, (1 - area.double() / (H * W)).float(), lam)
    return random_images(B, H, W, seed=seed), torch.randint(5, (B,), generator=generator), lam, box, cuts


@pytest.mark.parametrize("mode", ["elem", "pair", "batch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_timm_mixup(mode: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    timm_mixup = pytest.importorskip("timm.data.mixup")
    images, labels, lam, box, cuts = mixed_batch()
    if mode == "pair":
        half = B // 2
        lam, box, cuts = (torch.cat([t[:half], t[:half].flip(0)]) for t in (lam, box, cuts))
    if mode == "batch":
        row = int((box[:, 2] * box[:, 3]).argmax())
        lam, box, cuts = (t[row:row + 1].expand(B, *t.shape[1:]) for t in (lam, box, cuts))
    plan = plan_of(partner=torch.arange(B - 1, -1, -1), lam=lam.contiguous(), cut=box.contiguous())
    ours, targets = augment(images, labels, plan, MEAN, STD, 5, smoothing=smoothing)
    mixup = timm_mixup.Mixup(1.0, 1.0, mode=mode, label_smoothing=smoothing, num_classes=5)
    drawn = iter([(tuple(b), value) for b, value, cut in zip(box.tolist(), lam.tolist(), cuts) if cut and value != 1])

    def next_box(*_, **__):
        (y, x, h, w), value = next(drawn)
        return (y, y + h, x, x + w), value

    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", next_box)
    mixup._params_per_elem = lambda size: (lam[:size].numpy().copy(), cuts[:size].numpy())
    mixup._params_per_batch = lambda: (float(lam[0]), bool(cuts[0]))
    unmixed, _ = augment(images, labels, plan_of(), MEAN, STD, 5)
    theirs, their_targets = mixup(unmixed.clone(), labels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(targets, their_targets, rtol=0, atol=1e-7)


def test_torchvision_mixing() -> None:
    images, labels, _, box, _ = mixed_batch(3)
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    unmixed, _ = augment(images, labels, plan_of(), MEAN, STD, 5)
    y, x, h, w = box[(box[:, 2] * box[:, 3]).argmax()].tolist()
    rolled = torch.arange(B).roll(1)
    for transform, lam, cut in ((v2.MixUp(num_classes=5), 0.3, [0] * 4),
                                (v2.CutMix(num_classes=5), 1 - h * w / (H * W), [y, x, h, w])):
        params = {"labels": labels, "batch_size": B, "lam": lam, "box": (x, y, x + w, y + h), "lam_adjusted": lam}
        plan = plan_of(partner=rolled, lam=torch.full((B,), lam), cut=torch.tensor([cut] * B, dtype=torch.int32))
        ours, targets = augment(images, labels, plan, MEAN, STD, 5)
        torch.testing.assert_close(ours, transform.transform(unmixed, params), rtol=0, atol=1e-6)
        torch.testing.assert_close(targets, transform._mixup_label(labels, lam=lam), rtol=0, atol=1e-7)
        assert not torch.equal(targets, one_hot)


@pytest.mark.parametrize(("rows", "source", "size"), [
    (1, (28, 28), (28, 28)), (7, (32, 32), (32, 32)), (5, (40, 36), (28, 31)), (3, (224, 224), (224, 224)),
    (3, (384, 384), (384, 384))])
def test_the_sequence_of_operations(rows: int, source: tuple[int, int], size: tuple[int, int]) -> None:
    """Crop, flips, one color step, normalising, erasing, then mixing: the peers' operators one after the other."""
    g = torch.Generator().manual_seed(rows * size[0])
    images, labels, pad = random_images(rows, *source, seed=rows), torch.arange(rows) % 5, 4
    crop = torch.stack([torch.randint(-pad, have + pad - want + 1, (rows,), generator=g)
                        for have, want in zip(source, size)], dim=1).int()
    flip, vflip = torch.rand(2, rows, generator=g) < 0.5
    factor, lam = 1.5, torch.rand(rows, generator=g)  # exact in binary: torchvision's product is ours
    erased, cut = boxes(g, (rows, 1), *size), boxes(g, (rows,), *size)
    cut[::2] = 0
    plan = replace(neutral_plan(torch.arange(rows)), crop=crop, flip=flip, vflip=vflip, erase=erased, lam=lam, cut=cut,
                   jitter=torch.tensor([[round(factor * 65536), 65536, 65536]] * rows, dtype=torch.int32),
                   partner=torch.arange(rows).roll(1), remode="const", padding_mode="reflect")
    ours, targets = augment(images, labels, plan, MEAN, STD, 5, size)
    single = []
    for row in range(rows):
        y, x = crop[row].tolist()
        image = TF.crop(TF.pad(images[row], [pad] * 4, padding_mode="reflect"), y + pad, x + pad, *size)
        image = TF.horizontal_flip(image) if flip[row] else image
        image = normalised(TF.adjust_brightness(TF.vertical_flip(image) if vflip[row] else image, factor))
        y, x, h, w = erased[row, 0].tolist()
        single.append(TF.erase(image, y, x, h, w, torch.zeros(1)))
    for row, (y, x, h, w) in enumerate(cut.tolist()):
        other, weight = single[row - 1], lam[row]
        expected = single[row] * weight + other * (1 - weight)
        if h * w:
            expected = TF.erase(single[row], y, x, h, w, other[:, y:y + h, x:x + w])
        torch.testing.assert_close(ours[row], expected, rtol=0, atol=2e-6)
        one_hot = torch.nn.functional.one_hot(labels[[row, row - 1]], 5) * torch.stack([weight, 1 - weight])[:, None]
        torch.testing.assert_close(targets[row], one_hot.sum(0), rtol=0, atol=1e-7)


def test_smoothed_targets() -> None:
    images, labels, lam, box, _ = mixed_batch(4)
    _, targets = augment(images, labels, plan_of(), MEAN, STD, 5, smoothing=0.1)
    assert targets[0, labels[0]].item() == pytest.approx(0.92) and targets[0].min().item() == pytest.approx(0.02)
    plan = plan_of(partner=torch.arange(B).roll(3), lam=lam, cut=box)
    _, targets = augment(images, labels, plan, MEAN, STD, 5, smoothing=0.1)
    torch.testing.assert_close(targets.sum(1), torch.ones(B))
    same = labels == labels[plan.partner]
    assert same.any() and torch.allclose(targets[same, labels[same]], torch.tensor(0.92))


def test_erasing_comes_before_mixing() -> None:
    """DeiT's order: a partner's erased box is mixed in, weakened by 1 - lam; and it is the partner's own noise."""
    images = random_images(B, H, W)
    box = torch.zeros(B, 1, 4, dtype=torch.int32)
    box[1, 0] = torch.tensor([4, 5, 6, 7])
    swap = torch.arange(B)
    swap[:2] = torch.tensor([1, 0])
    lam = torch.ones(B)
    lam[0] = 0.75
    plan = plan_of(erase=box, noise_key=torch.arange(B) + 40, partner=swap, lam=lam)
    x, _ = augment(images, torch.zeros(B, dtype=torch.int64), plan, MEAN, STD, 1)
    z = noise(torch.tensor([41]), H, W)[0].permute(2, 0, 1)
    expected = 0.75 * normalised(images)[0] + 0.25 * z
    torch.testing.assert_close(x[0, :, 4:10, 5:12], expected[:, 4:10, 5:12], rtol=0, atol=1e-6)
    torch.testing.assert_close(x[1, :, 4:10, 5:12], z[:, 4:10, 5:12], rtol=0, atol=0)


def test_numpy_global_state_is_untouched() -> None:
    before = (np.random.get_state()[1].copy(), torch.get_rng_state())
    augment(random_images(B, H, W), torch.zeros(B, dtype=torch.int64),
            plan_of(erase=torch.tensor([[[0, 0, 9, 9]]] * B, dtype=torch.int32)), MEAN, STD, 1)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
