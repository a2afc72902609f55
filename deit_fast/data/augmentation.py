"""Sampling of augmentation plans: every random decision of an epoch as a pure function of (data seed, epoch, position).

Each decision is a word of Philox4x32 (reference/philox.py) with the data seed as key and (position, epoch, field,
draw) as counter (data/draw.py). There is no generator state: an epoch drawn at once, a batch drawn alone, a resumed
run and another device all get the same plan. Only the first side of alternating flips belongs to the image, so that an
epoch can show the other one.

Drawing in plain torch costs about the same per epoch however long it is cut, and per call some hundred small
operations: draw a whole epoch, then slice it.

The semantics are timm's and torchvision's where users know them: Mixup's modes with partner B - 1 - i, RandomErasing's
and RandomResizedCrop's ten tries, the latter's central crop when none fits, the CutMix box clipped at the border and
lambda corrected to its true area (Yun et al. 2019), ColorJitter's ranges and random order. A last odd batch, which timm
refuses, is mixed too: its middle sample is its own partner and stays as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deit_fast.data import draw as field
from deit_fast.data.draw import Draw, below, beta_table, box_sides, first, happens
from deit_fast.data.plan import MAX_SHIFT, NEUTRAL_FACTOR, Plan, Recipe, neutral_plan
from deit_fast.reference.philox import philox4x32, split

__all__ = ["Plan", "Recipe", "epoch_order", "neutral_plan", "sample_plan"]

ERASE_AREA = (0.02, 1 / 3)  # of the image, shared by its boxes; the four as in Zhong et al. 2017 and timm
ERASE_ASPECT = (0.3, 1 / 0.3)


def epoch_order(num_images: int, data_seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """The image drawn at every position of an epoch: (num_images,) int64 on the CPU, a random permutation.

    With repeats > 1 (repeated augmentation, Hoffer et al. 2020) every chosen image comes `repeats` times in a row and
    the epoch keeps its length, so it sees 1 / repeats of the images; MixUp's partner B - 1 - i then pairs copies of
    one image only in the middle of a batch. Any number of images makes a full epoch (timm's sampler cuts to a multiple
    of 256, and to nothing below that).
    """
    if repeats < 1:
        raise ValueError(f"epoch_order: repeats must be 1 or more, got {repeats}.")
    high, low, _, _ = philox4x32((torch.arange(num_images), epoch, field.ORDER, 0), split(data_seed))
    order = torch.argsort(((high >> 1) << 32) | low, stable=True)
    return order.repeat_interleave(repeats)[:num_images] if repeats > 1 else order


def sample_plan(recipe: Recipe, index: Tensor, data_seed: int, epoch: int, batch_size: int,
                image_size: int | tuple[int, int], first_position: int = 0, device: torch.device | str | None = None,
                source_size: int | tuple[int, int] | None = None) -> Plan:
    """The plan of positions first_position, first_position + 1, ... of an epoch.

    index: (N,) int64, the images at those positions. first_position must start a batch, and N must end one or the
    epoch: partners, and the draws of modes "batch" and "pair", belong to batches of `batch_size` (the last may be
    shorter). Sampling an epoch and slicing it equals sampling each batch alone. image_size is the output's,
    source_size the stored images' where it differs: crops then range over the padded source. device: where the plan is
    made, default index's. No value is read back and, after a recipe's first call, which brings its tables
    (data/draw.py), nothing but an index that is elsewhere is copied there: a CUDA graph can capture the call.
    """
    device = index.device if device is None else torch.device(device)
    if batch_size < 1:
        raise ValueError(f"sample_plan: batch_size must be 1 or more, got {batch_size}.")
    if first_position % batch_size:
        raise ValueError(f"sample_plan: first_position must start a batch of {batch_size}, got {first_position}.")
    size = _pair(image_size)
    source = size if source_size is None else _pair(source_size)
    position = first_position + torch.arange(index.shape[0], device=device)  # (N,)
    draw = Draw(data_seed, epoch)
    plan = neutral_plan(index, device).tensors()
    start = position // batch_size * batch_size
    partner = start + (first_position + len(position) - start).clamp(max=batch_size) - 1 - (position - start)
    plan["partner"] = position - start
    if recipe.crop_pad or recipe.hflip or recipe.jitters or source != size:
        y, x, flip, order = draw(position, field.GEOMETRY)
    if recipe.rrc:
        plan |= _resized_crop(recipe, draw, position, source)
    elif recipe.crop_pad or source != size:
        plan["crop"] = _crop(recipe, y, x, size, source)
    if recipe.hflip and recipe.alternating_flip:
        first_side, _, _, _ = Draw(data_seed, 0)(plan["index"], field.FIRST_FLIP)
        plan["flip"] = happens(first_side, recipe.hflip) ^ (epoch % 2 == 1)
    elif recipe.hflip:
        plan["flip"] = happens(flip, recipe.hflip)
    if recipe.vflip or recipe.grayscale:
        vflip, grayscale, _, _ = draw(position, field.SWITCHES)
        plan |= {"vflip": happens(vflip, recipe.vflip), "grayscale": happens(grayscale, recipe.grayscale)}
    if recipe.jitters:
        plan |= _jitter(recipe, draw, position, order)
    if recipe.reprob:
        plan |= _erasing(recipe, draw, position, size)
    if recipe.mixes:
        plan |= _mixing(recipe, draw, position, start, partner, size)
    return Plan(**plan, remode=recipe.remode, padding_mode=recipe.padding_mode)


def _crop(recipe: Recipe, y: Tensor, x: Tensor, size: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """crop, (N, 2) int32, from two words of each sample (N,)."""
    pad = recipe.crop_pad
    choices = [have + 2 * pad - want + 1 for have, want in zip(source, size)]
    if min(choices) < 1:
        raise ValueError(f"sample_plan: images of {source[0]}x{source[1]}, padded by {pad}, are smaller than the crop "
                         f"{size[0]}x{size[1]}.")
    return torch.stack([below(y, choices[0]) - pad, below(x, choices[1]) - pad], dim=1).int()


def _resized_crop(recipe: Recipe, draw: Draw, position: Tensor, source: tuple[int, int]) -> dict[str, Tensor]:
    """resized_crop and bicubic; position: (N,)."""
    H, W = source
    calls = torch.arange(field.TRY_CALLS, device=position.device)
    words = draw(position[:, None], field.RESIZE_TRIES, calls)  # 4 x (N, calls)
    w, h = box_sides(words, math.sqrt(H * W), recipe.scale, recipe.ratio)  # (N, T)
    fits, h, w = first((w > 0) & (w <= W) & (h > 0) & (h <= H), h, w)  # (N,)
    central_h, central_w = H, W
    if W / H < recipe.ratio[0]:
        central_h = max(round(W / recipe.ratio[0]), 1)
    elif W / H > recipe.ratio[1]:
        central_w = max(round(H * recipe.ratio[1]), 1)
    h, w = torch.where(fits, h, central_h), torch.where(fits, w, central_w)
    y, x, bicubic, _ = draw(position, field.RESIZE)
    y = torch.where(fits, below(y, H - h + 1), (H - central_h) // 2)
    x = torch.where(fits, below(x, W - w + 1), (W - central_w) // 2)
    chance = {"bilinear": 0.0, "bicubic": 1.0, "random": 0.5}[recipe.interpolation]
    return {"resized_crop": torch.stack([y, x, h, w], dim=1).int(), "bicubic": happens(bicubic, chance)}


def _jitter(recipe: Recipe, draw: Draw, position: Tensor, order: Tensor) -> dict[str, Tensor]:
    """jitter_order and jitter, J = 4 where the hue changes; position, order (a word of each sample): (N,)."""
    *factors, hue = draw(position, field.COLOR)
    columns = []
    for strength, word in zip((recipe.brightness, recipe.contrast, recipe.saturation), factors):
        low, high = (round(NEUTRAL_FACTOR * f) for f in (max(0.0, 1 - strength), 1 + strength))
        columns.append(low + below(word, high - low + 1))
    if recipe.hue:
        most = min(round(NEUTRAL_FACTOR * recipe.hue), MAX_SHIFT)
        columns.append(below(hue, 2 * most + 1) - most)
    return {"jitter_order": _orders(order, bool(recipe.hue)), "jitter": torch.stack(columns, dim=1).int()}


def _orders(word: Tensor, hue: bool) -> Tensor:
    """(N, J) uint8 permutations from words (N,): of 0, 1, 2 and, with hue, 3 at any place among them, J = 4.

    In arithmetic, since a table would be copied from the host. The three keep the order among themselves that the same
    word gives without hue.
    """
    code = below(word, 6)  # of the three's permutation, in lexicographic order
    head, rank = code // 2, code % 2
    middle = rank + (rank >= head)  # of the other two, the smaller one or the larger
    three = torch.stack([head, middle, 3 - head - middle], dim=1)  # (N, 3)
    if not hue:
        return three.to(torch.uint8)
    place, at = torch.arange(4, device=word.device), below(word, 24)[:, None] % 4  # (4,), (N, 1)
    others = three.gather(1, (place - (place > at).long()).clamp(max=2))  # (N, 4)
    return torch.where(place == at, 3, others).to(torch.uint8)


def _erasing(recipe: Recipe, draw: Draw, position: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """erase and noise_key: for each box the first of ten tries that is smaller than the image; position: (N,)."""
    (H, W), device = size, position.device
    gate, count, key_low, key_high = draw(position, field.ERASE)
    count = 1 + below(count, recipe.recount)  # (N,)
    boxes = torch.arange(recipe.recount, device=device)  # (R,)
    calls = boxes[:, None] * field.TRY_CALLS + torch.arange(field.TRY_CALLS, device=device)  # (R, calls)
    words = draw(position[:, None, None], field.TRIES, calls)  # 4 x (N, R, calls)
    roots = [math.sqrt(H * W / n) for n in range(1, recipe.recount + 1)]
    shares = torch.stack([torch.full((), root, dtype=torch.float64, device=device) for root in roots])
    share = shares[count - 1]
    h, w = box_sides(words, share[:, None, None], ERASE_AREA, ERASE_ASPECT)  # (N, R, T)
    fits, h, w = first((h < H) & (w < W), h, w)  # (N, R)
    y, x, _, _ = draw(position[:, None], field.BOX, boxes)
    used = happens(gate, recipe.reprob)[:, None] & (boxes < count[:, None]) & fits & (h * w > 0)
    box = torch.stack([below(y, H - h + 1), below(x, W - w + 1), h, w], dim=-1)
    return {"erase": (box * used[..., None]).int(), "noise_key": key_high << 32 | key_low}


def _mixing(recipe: Recipe, draw: Draw, position: Tensor, start: Tensor, partner: Tensor,
            size: tuple[int, int]) -> dict[str, Tensor]:
    """partner, lam and cut; position, start (of its batch), partner (in the epoch): (N,)."""
    H, W = size
    shared = {"batch": start, "pair": torch.minimum(position, partner), "elem": position}[recipe.mixup_mode]
    gate, switch, word, _ = draw(shared, field.MIX)
    mixed = happens(gate, recipe.mixup_prob) & (partner != position)
    quantile = word >> 16
    lam = torch.ones(len(position), dtype=torch.float64, device=position.device)
    cut = torch.zeros((len(position), 4), dtype=torch.int64, device=position.device)
    cuts = happens(switch, recipe.mixup_switch_prob if recipe.mixup > 0 else 1.0) & recipe.cuts
    if recipe.mixup > 0:
        lam = beta_table(recipe.mixup, position.device)[quantile]
    if recipe.cuts:
        words = draw(shared, field.CUT)
        if recipe.cutmix_minmax is not None:
            box = _minmax_box(words, recipe.cutmix_minmax, size)
            drawn = None
        else:
            drawn = beta_table(recipe.cutmix, position.device)[quantile]
            box = _cutmix_box(words, drawn, size)
        cut = box * (mixed & cuts)[:, None]
        area = box[:, 2] * box[:, 3]
        left = 1 - area.double() / (H * W)
        if drawn is not None and not recipe.correct_lam:
            left = torch.where(area > 0, drawn, 1.0)  # a lambda without a box would be MixUp's
        lam = torch.where(cuts, left, lam)
    lam = torch.where(mixed, lam, 1.0).float()
    return {"partner": torch.where(mixed, partner, position) - start, "lam": lam, "cut": cut.int()}


def _cutmix_box(words: tuple[Tensor, ...], lam: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) boxes of sides int(size sqrt(1 - lam)) around a uniform center, in whole halves, clipped; lam: (N,)."""
    ratio = torch.sqrt(1 - lam)
    spans = []
    for word, length in zip(words, size):
        half = (length * ratio).long() // 2
        center = below(word, length)
        low, high = (center - half).clamp(min=0), (center + half).clamp(max=length)
        spans.append((low, high - low))
    (y, h), (x, w) = spans
    return torch.stack([y, x, h, w], dim=1)


def _minmax_box(words: tuple[Tensor, ...], minmax: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """(N, 4) boxes with sides uniform in [int(min size), int(max size)), anywhere inside the image."""
    low = [int(length * minmax[0]) for length in size]
    choices = [max(1, int(length * minmax[1]) - a) for length, a in zip(size, low)]
    h, w = (a + below(word, n) for a, n, word in zip(low, choices, words[2:]))
    y, x = (below(word, length - side + 1) for word, length, side in zip(words, size, (h, w)))
    return torch.stack([y, x, h, w], dim=1)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
