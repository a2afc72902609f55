"""Sampling of augmentation plans: every random decision of an epoch as a pure function of (data seed, epoch, position).

Each decision is a word of Philox4x32 (reference/philox.py) with the data seed as key and (position, epoch, field,
draw) as counter. There is no generator state: an epoch drawn at once, a batch drawn alone, a resumed run and another
device all get the same plan. To be equal on CPU and GPU the arithmetic stays in integers, in tables built on the host,
and in fp64 additions, products, quotients and square roots, which IEEE rounds alike everywhere; exp, log and the
inverse of the Beta distribution's CDF, which are not, come as tables of 2^16 quantiles.

Drawing in plain torch costs about the same per epoch however long it is cut, and per call some hundred small
operations: draw a whole epoch, then slice it.

The semantics are timm's and torchvision's where users know them: Mixup's modes with partner B - 1 - i, RandomErasing's
ten tries, the CutMix box clipped at the border and lambda corrected to its true area (Yun et al. 2019), ColorJitter's
ranges and random order. A last odd batch, which timm refuses, is mixed too: its middle sample is its own partner and
stays as it is.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor

from deit_fast.data.plan import NEUTRAL_FACTOR, Plan, Recipe, neutral_plan
from deit_fast.reference.philox import philox4x32, split

__all__ = ["Plan", "Recipe", "epoch_order", "neutral_plan", "sample_plan"]

# The third word of the counter: what is drawn. GEOMETRY (y, x, flip, jitter order), COLOR (brightness, contrast,
# saturation, -), ERASE (whether, count, key low, key high), TRIES (four of the tries for one box each), BOX (y, x, -,
# -), MIX (whether, CutMix, lambda, -), CUT (y, x, h, w), ORDER (high, low, -, -).
GEOMETRY, COLOR, ERASE, TRIES, BOX, MIX, CUT, ORDER = range(8)

QUANTILES = 1 << 16
ERASE_AREA = (0.02, 1 / 3)  # of the image, shared by its boxes; the four as in Zhong et al. 2017 and timm
ERASE_ASPECT = (0.3, 1 / 0.3)
ERASE_TRIES = 10
TRY_CALLS = math.ceil(ERASE_TRIES / 4)  # one word per try: 16 bits of area, 16 of aspect


def epoch_order(num_images: int, data_seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """The image drawn at every position of an epoch: (num_images,) int64 on the CPU, a random permutation.

    With repeats > 1 (repeated augmentation, Hoffer et al. 2020) every chosen image comes `repeats` times in a row and
    the epoch keeps its length, so it sees 1 / repeats of the images; MixUp's partner B - 1 - i then pairs copies of
    one image only in the middle of a batch. Any number of images makes a full epoch (timm's sampler cuts to a multiple
    of 256, and to nothing below that).
    """
    if repeats < 1:
        raise ValueError(f"epoch_order: repeats must be 1 or more, got {repeats}.")
    high, low, _, _ = philox4x32((torch.arange(num_images), epoch, ORDER, 0), split(data_seed))
    order = torch.argsort(((high >> 1) << 32) | low, stable=True)
    return order.repeat_interleave(repeats)[:num_images] if repeats > 1 else order


def sample_plan(recipe: Recipe, index: Tensor, data_seed: int, epoch: int, batch_size: int,
                image_size: int | tuple[int, int], first_position: int = 0, device: torch.device | str | None = None,
                source_size: int | tuple[int, int] | None = None) -> Plan:
    """The plan of positions first_position, first_position + 1, ... of an epoch.

    index: (N,) int64, the images at those positions. first_position must start a batch, and N must end one or the
    epoch: partners, and the draws of modes "batch" and "pair", belong to batches of `batch_size` (the last may be
    shorter). Sampling an epoch and slicing it equals sampling each batch alone. image_size is the output's,
    source_size the stored images' where
    it differs: crops then range over the padded source. device: where the plan is made, default index's.
    """
    device = index.device if device is None else torch.device(device)
    if batch_size < 1:
        raise ValueError(f"sample_plan: batch_size must be 1 or more, got {batch_size}.")
    if first_position % batch_size:
        raise ValueError(f"sample_plan: first_position must start a batch of {batch_size}, got {first_position}.")
    size = _pair(image_size)
    source = size if source_size is None else _pair(source_size)
    position = first_position + torch.arange(index.shape[0], device=device)  # (N,)
    draw = _Draw(data_seed, epoch)
    plan = neutral_plan(index, device).tensors()
    start = position // batch_size * batch_size
    partner = start + (first_position + len(position) - start).clamp(max=batch_size) - 1 - (position - start)
    plan["partner"] = position - start
    if recipe.crop_pad or recipe.hflip or source != size or _jitters(recipe):
        plan |= _geometry(recipe, draw, position, size, source)
    if _jitters(recipe):
        plan["jitter"] = _factors(recipe, draw, position)
    if recipe.reprob:
        plan |= _erasing(recipe, draw, position, size)
    if recipe.mixes:
        plan |= _mixing(recipe, draw, position, start, partner, size)
    return Plan(**plan, remode=recipe.remode)


class _Draw:
    """Philox words of one epoch: draw(position, field, number) -> (4, ...) int64 in [0, 2^32), by counter alone."""

    def __init__(self, data_seed: int, epoch: int) -> None:
        self.key, self.epoch = split(data_seed), epoch

    def __call__(self, position: Tensor, field: int, number: Tensor | int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return philox4x32((position, self.epoch, field, number), self.key)


def _geometry(recipe: Recipe, draw: _Draw, position: Tensor, size: tuple[int, int],
              source: tuple[int, int]) -> dict[str, Tensor]:
    """crop, flip and jitter_order; position: (N,)."""
    y, x, flip, order = draw(position, GEOMETRY)
    pad = recipe.crop_pad
    choices = [have + 2 * pad - want + 1 for have, want in zip(source, size)]
    if min(choices) < 1:
        raise ValueError(f"sample_plan: images of {source[0]}x{source[1]}, padded by {pad}, are smaller than the crop "
                         f"{size[0]}x{size[1]}.")
    orders = torch.tensor(list(permutations(range(3))), dtype=torch.uint8, device=position.device)
    return {
        "crop": torch.stack([_below(y, choices[0]) - pad, _below(x, choices[1]) - pad], dim=1).int(),
        "flip": _happens(flip, recipe.hflip),
        "jitter_order": orders[_below(order, 6)],
    }


def _jitters(recipe: Recipe) -> bool:
    return bool(recipe.brightness or recipe.contrast or recipe.saturation)


def _factors(recipe: Recipe, draw: _Draw, position: Tensor) -> Tensor:
    """(N, 3) int32: the color factors, 16.16; position: (N,)."""
    columns = []
    for strength, word in zip((recipe.brightness, recipe.contrast, recipe.saturation), draw(position, COLOR)):
        low, high = (round(NEUTRAL_FACTOR * f) for f in (max(0.0, 1 - strength), 1 + strength))
        columns.append(low + _below(word, high - low + 1))
    return torch.stack(columns, dim=1).int()


def _erasing(recipe: Recipe, draw: _Draw, position: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """erase and noise_key: for each box the first of ten tries that is smaller than the image; position: (N,)."""
    (H, W), device = size, position.device
    gate, count, key_low, key_high = draw(position, ERASE)
    count = 1 + _below(count, recipe.recount)  # (N,)
    boxes = torch.arange(recipe.recount, device=device)  # (R,)
    calls = boxes[:, None] * TRY_CALLS + torch.arange(TRY_CALLS, device=device)  # (R, calls)
    words = draw(position[:, None, None], TRIES, calls)  # 4 x (N, R, calls)
    tries = torch.stack(words, dim=-1).flatten(-2)[..., :ERASE_TRIES]  # (N, R, T)
    root_area, root_aspect = _erase_tables(device)
    shares = [math.sqrt(H * W / n) for n in range(1, recipe.recount + 1)]
    share = torch.tensor(shares, dtype=torch.float64, device=device)
    side = share[count - 1][:, None, None] * root_area[tries >> 16]  # (N, R, T)
    aspect = root_aspect[tries & (QUANTILES - 1)]
    h, w = (side * aspect).round().long(), (side / aspect).round().long()
    rank = torch.arange(ERASE_TRIES, 0, -1, device=device)
    best, chosen = (((h < H) & (w < W)) * rank).max(dim=-1, keepdim=True)  # ranks differ: the first that fits wins
    h, w = h.gather(-1, chosen)[..., 0], w.gather(-1, chosen)[..., 0]  # (N, R)
    y, x, _, _ = draw(position[:, None], BOX, boxes)
    used = _happens(gate, recipe.reprob)[:, None] & (boxes < count[:, None]) & (best[..., 0] > 0) & (h * w > 0)
    box = torch.stack([_below(y, H - h + 1), _below(x, W - w + 1), h, w], dim=-1)
    return {"erase": (box * used[..., None]).int(), "noise_key": key_high << 32 | key_low}


def _mixing(recipe: Recipe, draw: _Draw, position: Tensor, start: Tensor, partner: Tensor,
            size: tuple[int, int]) -> dict[str, Tensor]:
    """partner, lam and cut; position, start (of its batch), partner (in the epoch): (N,)."""
    H, W = size
    shared = {"batch": start, "pair": torch.minimum(position, partner), "elem": position}[recipe.mixup_mode]
    gate, switch, word, _ = draw(shared, MIX)
    mixed = _happens(gate, recipe.mixup_prob) & (partner != position)
    quantile = word >> 16
    lam = torch.ones(len(position), dtype=torch.float64, device=position.device)
    cut = torch.zeros((len(position), 4), dtype=torch.int64, device=position.device)
    cuts = _happens(switch, recipe.mixup_switch_prob if recipe.mixup > 0 else 1.0) & recipe.cuts
    if recipe.mixup > 0:
        lam = _beta_table(recipe.mixup, position.device)[quantile]
    if recipe.cuts:
        words = draw(shared, CUT)
        if recipe.cutmix_minmax is not None:
            box = _minmax_box(words, recipe.cutmix_minmax, size)
        else:
            box = _cutmix_box(words, _beta_table(recipe.cutmix, position.device)[quantile], size)
        cut = box * (mixed & cuts)[:, None]
        lam = torch.where(cuts, 1 - (box[:, 2] * box[:, 3]).double() / (H * W), lam)
    lam = torch.where(mixed, lam, 1.0).float()
    return {"partner": torch.where(mixed, partner, position) - start, "lam": lam, "cut": cut.int()}


def _cutmix_box(words: tuple[Tensor, ...], lam: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) boxes of sides int(size sqrt(1 - lam)) around a uniform center, in whole halves, clipped; lam: (N,)."""
    ratio = torch.sqrt(1 - lam)
    spans = []
    for word, length in zip(words, size):
        half = (length * ratio).long() // 2
        center = _below(word, length)
        low, high = (center - half).clamp(min=0), (center + half).clamp(max=length)
        spans.append((low, high - low))
    (y, h), (x, w) = spans
    return torch.stack([y, x, h, w], dim=1)


def _minmax_box(words: tuple[Tensor, ...], minmax: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """(N, 4) boxes with sides uniform in [int(min size), int(max size)), anywhere inside the image."""
    low = [int(length * minmax[0]) for length in size]
    choices = [max(1, int(length * minmax[1]) - a) for length, a in zip(size, low)]
    h, w = (a + _below(word, n) for a, n, word in zip(low, choices, words[2:]))
    y, x = (_below(word, length - side + 1) for word, length, side in zip(words, size, (h, w)))
    return torch.stack([y, x, h, w], dim=1)


def _below(word: Tensor, n: Tensor | int) -> Tensor:
    """Uniform integers in [0, n) from 32-bit words; n < 2^31 or the product overflows, bias below n / 2^32."""
    return word * n >> 32


def _happens(word: Tensor, p: float) -> Tensor:
    """True with probability p, for 32-bit words."""
    return word < round(p * 2**32)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@lru_cache(maxsize=16)
def _beta_table(alpha: float, device: torch.device) -> Tensor:
    """The quantiles (i + 1/2) / 2^16 of Beta(alpha, alpha): (65536,) fp64.

    In log-odds t the density is (x (1 - x))^alpha with x = sigmoid(t): smooth and bell-shaped for every alpha, so
    trapezoids on [-T, 0] meet 1e-7; the right half is the left one's mirror image.
    """
    t = torch.linspace(-40 / alpha - 12, 0, 1 << 17, dtype=torch.float64)
    density = torch.exp(alpha * (torch.nn.functional.logsigmoid(t) + torch.nn.functional.logsigmoid(-t) + math.log(4)))
    mass = torch.cumulative_trapezoid(density)
    mass = torch.cat([mass.new_zeros(1), mass]) / (2 * mass[-1])  # mass[-1] = 1/2
    u = (torch.arange(QUANTILES // 2, dtype=torch.float64) + 0.5) / QUANTILES
    right = torch.searchsorted(mass, u).clamp(1, len(mass) - 1)
    part = (u - mass[right - 1]) / (mass[right] - mass[right - 1])
    left_half = torch.sigmoid(torch.lerp(t[right - 1], t[right], part))
    return torch.cat([left_half, 1 - left_half.flip(0)]).to(device)


@lru_cache(maxsize=16)
def _erase_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Square roots of the erased area's share (uniform) and of the aspect ratio (log-uniform): 2 x (65536,) fp64."""
    u = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    area = ERASE_AREA[0] + u * (ERASE_AREA[1] - ERASE_AREA[0])
    low, high = (math.log(a) for a in ERASE_ASPECT)
    return torch.sqrt(area).to(device), torch.exp((low + u * (high - low)) / 2).to(device)
