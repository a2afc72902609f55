"""The random numbers behind a plan: Philox words by counter, and the tables that turn them into distributions.

Everything here must give the same bits on CPU and GPU, so the arithmetic stays in integers, in tables built on the
host, and in fp64 additions, products and quotients, which IEEE rounds alike everywhere; exp, log and the inverse of the
Beta distribution's CDF, which are not, come as tables of 2^16 quantiles. The one square root, of CutMix's box, is not
either (torch 2.14 on a CPU is an ulp off for 1 number in 75), but its sides are then cut to whole pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from deit_fast.reference.philox import philox4x32, split

# The third word of the counter: what is drawn. GEOMETRY (y, x, flip, jitter order), COLOR (brightness, contrast,
# saturation, hue), ERASE (whether, count, key low, key high), TRIES (four of the tries for one box each), BOX (y, x, -,
# -), MIX (whether, CutMix, lambda, -), CUT (y, x, h, w), ORDER (high, low, -, -), RESIZE_TRIES (four tries), RESIZE
# (y, x, bicubic, -), SWITCHES (vertical flip, grayscale, -, -), FIRST_FLIP (flip, -, -, -; by image, not by position).
# A new field takes a new number, so that the draws of the others stay what they were.
(GEOMETRY, COLOR, ERASE, TRIES, BOX, MIX, CUT, ORDER, RESIZE_TRIES, RESIZE, SWITCHES, FIRST_FLIP) = range(12)

QUANTILES = 1 << 16
MOST_TRIES = 10  # of a box with random area and aspect ratio, as in timm and torchvision
TRY_CALLS = math.ceil(MOST_TRIES / 4)  # one word per try: 16 bits of area, 16 of aspect


class Draw:
    """Philox words of one epoch: draw(position, field, number) -> (4, ...) int64 in [0, 2^32), by counter alone."""

    def __init__(self, data_seed: int, epoch: int) -> None:
        self.key, self.epoch = split(data_seed), epoch

    def __call__(self, position: Tensor, field: int, number: Tensor | int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return philox4x32((position, self.epoch, field, number), self.key)


def below(word: Tensor, n: Tensor | int) -> Tensor:
    """Uniform integers in [0, n) from 32-bit words; n < 2^31 or the product overflows, bias below n / 2^32."""
    return word * n >> 32


def happens(word: Tensor, p: float) -> Tensor:
    """True with probability p, for 32-bit words."""
    return word < round(p * 2**32)


def box_sides(words: tuple[Tensor, ...], root_extent: Tensor | float, area: tuple[float, float],
              aspect: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The sides a, b (..., MOST_TRIES) of each try, rounded: a b is a share of the extent from U(area), log(a / b) from
    U(log aspect).

    words: 4 x (..., TRY_CALLS); root_extent: the square root of the area that counts as 1.
    """
    tries = torch.stack(words, dim=-1).flatten(-2)[..., :MOST_TRIES]
    root_area, root_aspect = _box_tables(area, aspect, tries.device)
    side, factor = root_extent * root_area[tries >> 16], root_aspect[tries & (QUANTILES - 1)]
    return (side * factor).round().long(), (side / factor).round().long()


def first(fits: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    """Whether any try fits (...), and the sides (...) of the first that does; all: (..., MOST_TRIES)."""
    rank = torch.arange(MOST_TRIES, 0, -1, device=fits.device)
    best, chosen = (fits * rank).max(dim=-1, keepdim=True)  # ranks differ: the first that fits wins
    return best[..., 0] > 0, *(side.gather(-1, chosen)[..., 0] for side in sides)


@lru_cache(maxsize=16)
def beta_table(alpha: float, device: torch.device) -> Tensor:
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
def _box_tables(area: tuple[float, float], aspect: tuple[float, float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Square roots of a box's area (uniform) and of its aspect ratio (log-uniform): 2 x (65536,) fp64."""
    u = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    areas = area[0] + u * (area[1] - area[0])
    low, high = (math.log(a) for a in aspect)
    return torch.sqrt(areas).to(device), torch.exp((low + u * (high - low)) / 2).to(device)
