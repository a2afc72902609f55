"""Random calls of `augment` for hypothesis: every setting, sides up to 384 pixels, sources that lie in memory anyhow;
then with values out of range, and what a GPU takes those for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from augment_plans import MEAN, STD, random_images, random_plan
from deit_fast import reference
from deit_fast.data.augmentation import Plan, Recipe, sample_plan
from deit_fast.reference.augment import inside_box
from deit_fast.reference.geometry import source_size

NOISE = 2e-6  # |native - reference| of one N(0, 1) number: some roundings of 5.8, the largest there is
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of a number, once
LARGE = 10_000  # pixels: larger images come two at a time


def _padded(images: Tensor) -> Tensor:
    """Bytes between the rows, the planes and the images."""
    M, C, H, W = images.shape
    space = torch.full((M, C + 1, H + 2, W + 5), 0xA5, dtype=torch.uint8)
    return space[:, 1:, 1:-1, 3:-2].copy_(images)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of (M, 3, H, W): the same pixels, of its first plane if gray
    "chw": lambda images: images,
    "hwc": lambda images: images.permute(0, 2, 3, 1).contiguous(),
    "gray chw": lambda images: images[:, :1].contiguous().expand(-1, 3, -1, -1),
    "gray hwc": lambda images: images[:, 0, :, :, None].contiguous().expand(-1, -1, -1, 3),
    "channels last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "padded": _padded,
    "padded hwc": lambda images: _padded(images.permute(0, 2, 1, 3)).permute(0, 2, 3, 1),
    "planes apart": lambda images: images.transpose(0, 1).contiguous().transpose(0, 1),
    "turned": lambda images: images.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda images: torch.stack([images, ~images], dim=-1)[..., 0],
    "one image": lambda images: images[:1].expand(images.shape),
}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of `augment`."""

    images: Tensor = field(repr=False)  # any layout
    labels: Tensor  # (M,)
    plan: Plan
    settings: dict[str, Any]  # the other arguments, all of them
    layout: str = "chw"

    def arguments(self) -> dict[str, Any]:
        return {"images": self.images, "labels": self.labels, "plan": self.plan, **self.settings}

    def noisy(self) -> Tensor:
        """(B, 1, H', W') bool: pixels that noise reaches, their own or their partner's."""
        plan = self.plan
        if plan.remode == "const":
            return torch.zeros(len(plan), 1, *self.settings["size"], dtype=torch.bool)
        own = inside_box(plan.erase, *self.settings["size"]).any(1)
        return (own | own[plan.partner])[:, None]

    def assert_served(self, x: Tensor, targets: Tensor) -> None:
        """x and targets are the reference's: noise within a few roundings, all else to the last bit."""
        other, other_targets = reference.augment(**self.arguments())
        assert x.dtype == other.dtype and x.shape == other.shape and targets.dtype == other_targets.dtype
        last = self.settings["channels_last"]
        assert x.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        noisy = self.noisy()
        assert torch.equal(targets, other_targets)
        assert torch.equal(x.masked_fill(noisy, 0), other.masked_fill(noisy, 0))
        if noisy.any():
            error, size = (x.float() - other.float()).abs(), other.float().abs()
            assert (error * noisy <= ROUNDING[x.dtype] * size + NOISE).all()


@st.composite
def calls(draw: st.DrawFn, most: int = 384, rows: tuple[int, int] = (0, 9),
          dtypes: tuple[torch.dtype, ...] = tuple(ROUNDING)) -> Call:
    """A call in range: a plan of fields anywhere in their ranges, or one drawn from a random recipe.

    most: pixels a side, beyond 70 for an eighth of the calls.
    """
    seed = draw(st.integers(0, 2**20))
    side = st.integers(1, most if draw(st.integers(0, 7)) == 7 else min(most, 70))
    source, size = (draw(st.tuples(side, side)) for _ in range(2))
    B = draw(st.integers(*rows))
    if max(source[0] * source[1], size[0] * size[1]) > LARGE:
        B = min(B, 2)
    M = draw(st.integers(1, B + 3))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    images = LAYOUTS[layout](random_images(M, *source, seed=seed))
    source = source_size(images)  # (M, 3, W, 3) counts as three planes
    remode, recount = draw(st.sampled_from(["const", "rand", "pixel"])), draw(st.integers(0, 3))
    if draw(st.booleans()):
        plan = _sampled(draw, B, M, source, size, remode, seed)
    else:
        plan = random_plan(B, M, source, size, recount, remode, seed, draw(st.booleans()), draw(st.booleans()))
    mean, std = draw(st.sampled_from([(MEAN, STD), ((0.0,) * 3, (1.0,) * 3), ((-1.0, 0.5, 3.0), (0.02, 5.0, 1.0))]))
    K = draw(st.one_of(st.integers(1, 12), st.just(1030)))
    labels = torch.randint(K, (M,), generator=torch.Generator().manual_seed(seed))
    return Call(images, labels, plan, {
        "mean": mean, "std": std, "num_classes": K, "size": size, "dtype": draw(st.sampled_from(dtypes)),
        "smoothing": draw(st.sampled_from([0.0, 0.1, 0.999])), "channels_last": draw(st.booleans())}, layout)


def _sampled(draw: st.DrawFn, B: int, M: int, source: tuple[int, int], size: tuple[int, int], remode: str,
             seed: int) -> Plan:
    """A batch of B, whole or the short last one of an epoch, as `sample_plan` draws it."""
    needed = max(0, *((want - have + 1) // 2 for want, have in zip(size, source)))
    most = min(size)  # padding by more reaches crops that see nothing of the image, which no plan may have
    share, strength = st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.4, 5.0])
    recipe = Recipe(
        crop_pad=min(needed + draw(st.integers(0, 5)), most), rrc=draw(st.booleans()) or needed > most,
        padding_mode=draw(st.sampled_from(["constant", "reflect"])),
        interpolation=draw(st.sampled_from(["bilinear", "bicubic", "random"])), hflip=draw(share), vflip=draw(share),
        brightness=draw(strength), contrast=draw(strength), saturation=draw(strength),
        hue=draw(st.sampled_from([0.0, 0.1, 0.5])), grayscale=draw(share), reprob=draw(share), remode=remode,
        recount=draw(st.integers(1, 3)), mixup=draw(share), cutmix=draw(share),
        cutmix_minmax=draw(st.sampled_from([None, (0.2, 0.8)])), correct_lam=draw(st.booleans()),
        mixup_prob=draw(st.sampled_from([0.5, 1.0])), mixup_switch_prob=draw(share),
        mixup_mode=draw(st.sampled_from(["batch", "pair", "elem"])))
    index = torch.randint(M, (B,), generator=torch.Generator().manual_seed(seed))
    batch_size = max(B, 1) + draw(st.sampled_from([0, 0, 3]))
    return sample_plan(recipe, index, seed, draw(st.integers(0, 3)), batch_size, size, source_size=source)


# ---- out of range ----

@st.composite
def spoilt_calls(draw: st.DrawFn, most_fields: int, rows: tuple[int, int] = (1, 7),
                 **options: Any) -> tuple[Call, list[str]]:
    """(a call with some values of some fields anywhere in their dtype, the fields); jitter_order is not among them."""
    call = draw(calls(rows=rows, **options))
    tensors = {"labels": call.labels, **call.plan.tensors()}
    fields = [name for name, tensor in tensors.items() if name != "noise_key" and tensor.numel()
              and tensor.dtype not in (torch.bool, torch.uint8)]
    names = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=most_fields, unique=True))
    for name in names:
        tensor = tensors[name].clone()
        for _ in range(draw(st.integers(1, 3))):
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(_anything(tensor.dtype))
        if name == "labels":
            call = replace(call, labels=tensor)
        else:
            call = replace(call, plan=replace(call.plan, **{name: tensor}))
    return call, names


def _anything(dtype: torch.dtype) -> st.SearchStrategy:
    if dtype == torch.float32:
        return st.one_of(st.floats(width=32), st.sampled_from([-0.0, 1.0 + 2.0**-23, -(2.0**-149)]))
    info = torch.iinfo(dtype)
    return st.one_of(st.integers(-400, 400), st.integers(info.min, info.max), st.sampled_from([info.min, info.max]))


def clamped(call: Call) -> Call:
    """The call that a GPU takes it for: each value the nearest in its range, and of boxes what lies inside.

    A box of the source begins inside and keeps a pixel; where its sides were not positive, it stays without area.
    """
    plan, M, B, size = call.plan, call.images.shape[0], len(call.plan), torch.tensor(call.settings["size"])
    source = torch.tensor(source_size(call.images))
    resized, cut = plan.resized_crop.long(), plan.cut.long()  # boxes of int64: no sum of two sides overflows
    corner = torch.minimum(resized[:, :2].clamp(min=0), source - 1)
    sides = torch.minimum(resized[:, 2:].clamp(min=0), source - corner) * (resized[:, 2:] > 0).all(1, keepdim=True)
    cut[:, 2:] *= (cut[:, 2:] > 0).all(1, keepdim=True)
    factors, shifts = plan.jitter[:, :3].clamp(0, 64 << 16), plan.jitter[:, 3:].clamp(-(1 << 15), 1 << 15)
    return replace(call, plan=replace(
        plan, index=plan.index.clamp(0, M - 1), resized_crop=torch.cat([corner, sides], dim=1),
        crop=torch.maximum(torch.minimum(plan.crop.long(), source), -size), jitter=torch.cat([factors, shifts], dim=1),
        erase=plan.erase.long(), partner=plan.partner.clamp(0, B - 1), cut=cut,
        lam=plan.lam.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)))
