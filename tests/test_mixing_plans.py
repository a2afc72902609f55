"""Sampling of mixing: who mixes with whom, how much, and the boxes of CutMix (peer points 21, 23, 24, 28).

Fixed seeds and 40,000 samples, as in test_augmentation.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from deit_fast.data import draw as draws
from deit_fast.data.augmentation import Plan, Recipe
from test_augmentation import N, P_MIN, assert_rate, assert_uniform, draw


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8, 1.0, 4.0, 100.0])
def test_beta_table(alpha: float) -> None:
    from scipy.special import betaincinv

    table = draws.beta_table(alpha, torch.device("cpu"))
    u = (np.arange(65536) + 0.5) / 65536
    assert np.abs(table.numpy() - betaincinv(alpha, alpha, u)).max() < 1e-7


def mixed(plan: Plan) -> torch.Tensor:
    return plan.partner != torch.arange(len(plan)) % 64


@pytest.mark.parametrize(("mode", "independent"), [("batch", 64), ("pair", 2), ("elem", 1)])
def test_mixing_rates_and_lambda(mode: str, independent: int) -> None:
    recipe = Recipe(mixup=0.8, cutmix=1.0, mixup_prob=0.7, mixup_switch_prob=0.3, mixup_mode=mode)
    plan = draw(recipe, 64 * (500 if mode == "batch" else 625))
    first = slice(0, None, 64) if mode == "batch" else slice(None)
    if mode == "pair":  # the first of each pair
        first = torch.arange(len(plan)) % 64 < 32
    is_mixed, cuts = mixed(plan)[first], (plan.cut[first, 2] * plan.cut[first, 3]) > 0
    assert_rate(is_mixed, 0.7)
    lam = plan.lam[first]
    whole = is_mixed & ~cuts & (lam == 1)  # CutMix whose box came out empty
    assert_rate((cuts | whole)[is_mixed], 0.3)
    assert stats.kstest(lam[is_mixed & ~cuts & ~whole].numpy(), "beta", (0.8, 0.8)).pvalue > P_MIN
    assert (plan.lam[~mixed(plan)] == 1).all() and (plan.cut[~mixed(plan)] == 0).all()


def test_modes_share_their_draws() -> None:
    recipe = Recipe(mixup=0.8, cutmix=1.0)
    batches = {mode: draw(replace(recipe, mixup_mode=mode), 6400) for mode in ("batch", "pair", "elem")}
    for name in ("lam", "cut"):
        rows = {mode: plan.tensors()[name].reshape(100, 64, -1) for mode, plan in batches.items()}
        assert (rows["batch"] == rows["batch"][:, :1]).all()
        assert torch.equal(rows["pair"], rows["pair"].flip(1))
        assert not torch.equal(rows["elem"], rows["elem"].flip(1)) and (rows["pair"] != rows["pair"][:, :1]).any()
    partner = torch.arange(63, -1, -1)
    assert (batches["batch"].partner.view(100, 64) == partner).all()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_odd_batches_leave_the_middle_alone(mode: str) -> None:
    recipe = Recipe(mixup=0.8, cutmix=1.0, mixup_mode=mode)
    for n in (1, 7):
        plan = draw(recipe, 64 + n)[64:]
        middle = n // 2
        assert plan.partner.tolist() == list(range(n - 1, -1, -1))
        assert plan.lam[middle] == 1 and (plan.cut[middle] == 0).all()
        assert n == 1 or (plan.lam != 1).any()


@pytest.mark.parametrize(("H", "W"), [(33, 33), (16, 64)])
def test_cutmix_boxes(H: int, W: int) -> None:
    plan = draw(Recipe(cutmix=1.0, mixup_mode="elem"), size=(H, W))
    y, x, h, w = plan.cut.long().unbind(1)
    assert torch.equal(plan.lam, (1 - (h * w).double() / (H * W)).float())  # corrected after clipping
    generator = np.random.default_rng(1)
    ratio = np.sqrt(1 - generator.beta(1, 1, N))
    center_y, center_x = generator.integers(H, size=N), generator.integers(W, size=N)
    half_h, half_w = (H * ratio).astype(int) // 2, (W * ratio).astype(int) // 2
    top, left = np.clip(center_y - half_h, 0, H), np.clip(center_x - half_w, 0, W)
    areas = (np.clip(center_y + half_h, 0, H) - top) * (np.clip(center_x + half_w, 0, W) - left)
    used = (h * w > 0).numpy()
    assert stats.ks_2samp((h * w).numpy(), areas).pvalue > P_MIN
    assert stats.ks_2samp(y.numpy()[used], top[areas > 0]).pvalue > P_MIN
    assert ((y == 0) & (h > 0)).any() and (y + h == H).any() and (x + w == W).any()
    whole = (y > 0) & (y + h < H) & (x > 0) & (x + w < W)  # not clipped: both sides halve to the same integer
    assert (h[whole] % 2 == 0).all() and (w[whole] % 2 == 0).all()
    assert ((w[whole].double() / h[whole].clamp(min=1) - W / H).abs() <= W / H).all()


def test_cutmix_minmax() -> None:
    plan = draw(Recipe(cutmix_minmax=(0.25, 0.75), mixup_mode="elem"), size=(32, 64))
    y, x, h, w = plan.cut.unbind(1)
    assert_uniform(h, 8, 23)
    assert_uniform(w, 16, 47)
    assert (y == 0).any() and (y + h == 32).any() and (x + w == 64).any() and (x + w).max() <= 64
    assert_uniform(y[h == 20], 0, 12)


def test_switching_needs_both() -> None:
    only_cut = draw(Recipe(cutmix=1.0, mixup_switch_prob=0.0, mixup_mode="elem"), 640)
    assert (only_cut.cut[:, 2] > 0).float().mean() > 0.8
    only_mix = draw(Recipe(mixup=1.0, mixup_switch_prob=1.0, mixup_mode="elem"), 640)
    assert (only_mix.cut == 0).all() and (only_mix.lam < 1).all()
