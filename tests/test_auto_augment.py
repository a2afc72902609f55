"""Policies: torchvision's are torchvision's, timm's notation means what timm means by it where it can."""

import pytest
import torch

from deit_fast.data import auto_augment
from deit_fast.data.auto_augment import create_policy
from deit_fast.errors import ConfigError

MEAN = (0.5, 0.4, 0.3)
RAND = "rand-m9-mstd0.5-inc1"


@pytest.mark.parametrize("name", ["ra", "ta_wide"])
def test_torchvisions_policies_are_torchvisions(name):
    from torchvision.transforms import InterpolationMode, v2

    theirs = {"ra": v2.RandAugment, "ta_wide": v2.TrivialAugmentWide}[name](interpolation=InterpolationMode.BILINEAR)
    ours, images = create_policy(name, MEAN), torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    changed = 0
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)
        changed += not torch.equal(expected, image)
    assert changed > 10


def test_timms_notation_sets_count_probability_and_magnitude(monkeypatch):
    policy = create_policy(RAND, (0.5, 0.25, 0.0))
    assert (policy.layers, policy.prob, policy.magnitude, policy.magnitude_std) == (2, 0.5, 9.0, 0.5)
    assert policy.transform.fill == [128, 64, 0] and policy.transform.num_ops == 1
    levels = []

    class Record:
        magnitude = None

        def __call__(self, image):
            levels.append(self.magnitude)

    monkeypatch.setattr(policy, "transform", Record())
    torch.manual_seed(0)
    for _ in range(2000):
        policy(torch.zeros(3, 4, 4, dtype=torch.uint8))
    levels = torch.tensor(levels, dtype=torch.float)
    assert abs(len(levels) - 2000) < 120  # 4000 layers at p = 0.5, standard deviation 32
    assert levels.max() <= 30 and abs(levels.mean() - 27) < 0.2 and abs(levels.std() - 1.5) < 0.2
    plain = create_policy("rand-m10-n3-p1", MEAN)
    assert (plain.layers, plain.prob, plain.magnitude, plain.magnitude_std) == (3, 1.0, 10.0, 0.0)


@pytest.mark.parametrize("key, level", [("Rotate", 27.0), ("ShearX", 0.27), ("Brightness", 0.81), ("Solarize", 0.1)])
def test_magnitude_nine_is_nine_tenths_of_timms_range(key, level):
    from torchvision.transforms import v2

    magnitudes, _ = v2.RandAugment._AUGMENTATION_SPACE[key]
    assert abs(float(magnitudes(31, 32, 32)[round(9 / auto_augment.TIMM_TOP * auto_augment.TOP_LEVEL)]) - level) < 1e-5


@pytest.mark.parametrize("name", ["none", "", None])
def test_no_policy(name):
    assert create_policy(name, MEAN) is None


@pytest.mark.parametrize("name, word", [
    ("augmix", "unknown policy"), ("rand-m11", "m11 is out of range"), ("rand-m9-x3", "'x3'"), ("rand-n1.5", "n1.5"),
    ("rand-p2", "p2 is out of range"), ("rand-m9-tweights", "'tweights'"), ("rand-m", "'m'"),
    ("rand-mstd101", "mstd101"), ("randaugment", "unknown policy"),
])  # fmt: skip
def test_policies_that_are_not_known_are_refused(name, word):
    with pytest.raises(ConfigError, match=word):
        create_policy(name, MEAN)


def test_position_seed_is_a_fixed_function():
    seeds = {auto_augment.position_seed(s, e, p) for s in range(4) for e in range(4) for p in range(64)}
    assert len(seeds) == 1024 and max(seeds) < 2**63
    assert auto_augment.position_seed(0, 1, 2) == 4450782424123420391  # on every machine
