"""Loaders: an epoch is its plan applied, wherever it is resumed and however many workers serve it."""

import gc
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from deit_fast.data import auto_augment
from deit_fast.data import loader as loader_module
from deit_fast.data.augmentation import Recipe
from deit_fast.data.loader import EvalLoader, TrainLoader, centred_plan
from deit_fast.data.split import Split
from deit_fast.errors import DataError
from deit_fast.ops import augment
from deit_fast.training.build import build_recipe
from deit_fast.training.config import parse
from tape import Tape

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
RAND = "rand-m9-mstd0.5-inc1"
FULL = Recipe(crop_pad=4, hflip=0.5, brightness=0.3, contrast=0.3, saturation=0.3, reprob=0.5, mixup=0.8, cutmix=1.0,
              mixup_mode="elem")  # fmt: skip


def make_split(count=50, size=12, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % classes)


def make_loader(recipe=FULL, split=None, batch_size=8, num_classes=5, **options):
    return TrainLoader(split or make_split(), recipe, MEAN, STD, num_classes, batch_size, **options)


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q, strict=True))


# --- epochs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last, steps, images", [(True, 6, 48), (False, 7, 50)])
def test_an_epoch_is_its_plan_applied(drop_last, steps, images):
    split = make_split()
    loader = make_loader(split=split, drop_last=drop_last, smoothing=0.1)
    assert len(loader) == steps and loader.images_per_epoch == images
    plan = loader.plan(3)
    assert len(plan) == images
    expected = [
        augment(split.images, split.labels, plan[i : i + 8], MEAN, STD, 5, smoothing=0.1) for i in range(0, images, 8)
    ]
    assert same(loader.epoch(3), expected)
    assert not same(loader.epoch(3), loader.epoch(4))
    assert not same(loader.epoch(3), make_loader(split=split, drop_last=drop_last, smoothing=0.1, data_seed=1).epoch(3))


PATHS = [{}, {"drop_last": False}, {"auto_augment": RAND}, {"auto_augment": RAND, "workers": 2}]


@pytest.mark.parametrize("options", PATHS)
def test_resuming_at_any_step_is_bit_exact(options):
    torch.manual_seed(0)
    whole = list(make_loader(repeats=2, **options).epoch(1))
    for start in (1, len(whole) - 1, len(whole)) if options.get("workers") else range(len(whole) + 1):
        torch.manual_seed(start)
        loader = make_loader(repeats=2, **options)
        assert same(loader.epoch(1, start), whole[start:])


def test_what_was_prefetched_and_dropped_is_not_missed():
    loader = make_loader(auto_augment="ta_wide", workers=1)
    whole = list(loader.epoch(0))
    batches = loader.epoch(0)
    begun = [next(batches), next(batches)]
    del batches  # a run that stops here: its worker is some batches ahead
    gc.collect()
    assert same(begun + list(loader.epoch(0, 2)), whole)


@pytest.mark.parametrize("options", [{}, {"auto_augment": RAND}, {"auto_augment": "ra", "workers": 1}])
def test_the_global_generator_is_left_alone(options):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    list(make_loader(**options).epoch(0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", [RAND, "ra", "ta_wide"])
def test_the_number_of_workers_changes_nothing(name):
    reference = list(make_loader(auto_augment=name).epoch(2))
    assert same(make_loader(auto_augment=name, workers=2).epoch(2), reference)


def test_policies_run_on_one_thread_and_give_the_others_back(monkeypatch):
    threads = []
    monkeypatch.setattr(auto_augment.Policy, "__call__", lambda self, x: threads.append(torch.get_num_threads()) or x)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(make_loader(auto_augment="ra").epoch(0))
        assert set(threads) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def numbered_split(count):
    """Image i has red value i % 256 and green value i // 256 everywhere."""
    rows = torch.arange(count)
    colors = torch.stack([rows % 256, rows // 256, torch.zeros_like(rows)], 1).to(torch.uint8)
    return Split(colors[:, :, None, None].repeat(1, 1, 4, 4), rows)


def seen_numbers(batches):
    images = torch.cat([images for images, _ in batches])
    red, green = ((images[:, c].mean((1, 2)) * STD[c] + MEAN[c]) * 255 for c in (0, 1))
    return (red.round() + 256 * green.round()).long()


def test_every_image_comes_once_with_its_label():
    loader = TrainLoader(numbered_split(300), Recipe(), MEAN, STD, 300, 32, drop_last=False)
    batches = list(loader.epoch(0))
    numbers = seen_numbers(batches)
    assert torch.equal(numbers.sort().values, torch.arange(300)) and not torch.equal(numbers, torch.arange(300))
    assert torch.equal(torch.cat([targets for _, targets in batches]).argmax(1), numbers)
    assert not torch.equal(seen_numbers(loader.epoch(1)), numbers)


def test_the_recipe_may_be_replaced_between_epochs():
    loader = make_loader()
    before = list(loader.epoch(0))
    running = loader.epoch(0)
    loader.recipe = Recipe()
    assert same(running, before)  # an epoch keeps the recipe that it began with
    assert all(((targets == 0) | (targets == 1)).all() for _, targets in loader.epoch(0))
    assert not all(((targets == 0) | (targets == 1)).all() for _, targets in before)


# --- repeated augmentation (points 27 and 28) ------------------------------------------------------------------------


def test_repeats_keep_the_epochs_length_and_show_a_third_of_the_images():
    loader = TrainLoader(numbered_split(900), Recipe(), MEAN, STD, 900, 30, repeats=3)
    first, second = (seen_numbers(loader.epoch(epoch)) for epoch in (0, 1))
    assert len(first) == 900 and len(first.unique()) == 300
    assert torch.equal(first.view(-1, 3), first[::3, None].expand(-1, 3))  # copies are adjacent, in one batch
    assert len(torch.cat([first, second]).unique()) > 400  # another third in the next epoch
    other = TrainLoader(numbered_split(900), Recipe(), MEAN, STD, 900, 30, repeats=3, data_seed=1)
    assert not torch.equal(seen_numbers(other.epoch(0)), first)


def test_repeats_leave_a_small_set_an_epoch():
    loader = TrainLoader(numbered_split(100), Recipe(), MEAN, STD, 100, 10, repeats=3)
    assert len(loader) == 10 and len(seen_numbers(loader.epoch(0))) == 100


def test_copies_are_augmented_each_in_its_own_way():
    loader = make_loader(Recipe(crop_pad=4, hflip=0.5), repeats=3, batch_size=48)
    ((images, _),) = loader.epoch(0)
    different = [not torch.equal(images[i], images[i + 1]) for i in range(0, 48, 3)]
    assert sum(different) >= 14
    policy = make_loader(Recipe(), repeats=3, batch_size=48, auto_augment="ta_wide")
    ((images, _),) = policy.epoch(0)
    assert sum(not torch.equal(images[i], images[i + 1]) for i in range(0, 48, 3)) >= 8


def test_every_position_has_draws_of_its_own():
    equal = Split(make_split(1, 16).images.repeat(24, 1, 1, 1), torch.zeros(24, dtype=torch.int64))
    for workers in (0, 2):  # two workers with one seed would repeat each other's batches
        loader = make_loader(Recipe(), equal, auto_augment="ta_wide", workers=workers)
        images = torch.cat([images for images, _ in loader.epoch(0)])
        assert len(images.unique(dim=0)) >= 20
        again = torch.cat([images for images, _ in loader.epoch(1)])
        assert sum(not torch.equal(a, b) for a, b in zip(images, again)) >= 18


def test_copies_rarely_mix_with_each_other():
    loader = TrainLoader(numbered_split(960), Recipe(mixup=0.8), MEAN, STD, 960, 64, repeats=3)
    plan = loader.plan(0)
    for first in range(0, 960, 64):
        batch = plan[first : first + 64]
        assert (batch.partner != torch.arange(64)).all()
        assert (batch.index == batch.index[batch.partner]).sum() <= 2  # the two in the middle at most


# --- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 9])
def test_workers_and_op_share_the_work_without_a_seam(monkeypatch, size):
    """With a policy that does nothing, crop and flip in the worker and the rest in the op equal the op alone."""
    monkeypatch.setattr(auto_augment.Policy, "__call__", lambda self, image: image)
    alone = make_loader(size=size, drop_last=False, smoothing=0.1)
    shared = make_loader(size=size, drop_last=False, smoothing=0.1, auto_augment=RAND)
    assert same(shared.epoch(0), alone.epoch(0))


def test_the_policy_comes_after_crop_and_flip(monkeypatch):
    """DeiT's order: a policy that paints its input's left column white leaves that column where it is."""

    def paint(self, image):
        image = image.clone()
        image[:, :, 0] = 255
        return image

    monkeypatch.setattr(auto_augment.Policy, "__call__", paint)
    for images, _ in make_loader(Recipe(crop_pad=4, hflip=0.5), auto_augment="ra").epoch(0):
        white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.allclose(images[:, :, :, 0], white[None, :, None].expand(8, 3, 12), atol=1e-5)


def test_kernels_never_run_in_workers(monkeypatch):
    main, pids = os.getpid(), []
    monkeypatch.setattr(loader_module, "augment", lambda *a, **k: pids.append(os.getpid()) or augment(*a, **k))
    list(make_loader(auto_augment="ra", workers=1).epoch(0))
    assert set(pids) == {main} and len(pids) == 6  # a call in a worker would be missing from this list


# --- evaluation (point 32) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, sizes", [(16, [16, 16, 16, 2]), (50, [50]), (64, [50]), (1, [1] * 50)])
def test_evaluation_sees_every_image_once_normalised_only(batch_size, sizes):
    split = make_split()
    loader = EvalLoader(split, MEAN, STD, 5, batch_size)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == sizes and len(loader) == len(sizes)
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    scale = torch.tensor([MEAN, STD])[:, None, :, None, None]
    assert torch.allclose(images, (split.images / 255 - scale[0]) / scale[1], atol=1e-5)
    assert torch.equal(labels, split.labels) and labels.dtype == torch.int64
    assert same(loader, batches)


def test_training_without_a_recipe_and_evaluation_give_the_same_pixels():
    split = make_split()
    loader = make_loader(Recipe(), split)
    order = loader.plan(0).index
    evaluated = torch.cat([images for images, _ in EvalLoader(split, MEAN, STD, 5, 7)])
    assert torch.equal(torch.cat([images for images, _ in loader.epoch(0)]), evaluated[order])


@pytest.mark.parametrize("size, first", [(8, 2), (9, 1), (7, 2), (11, 0)])
def test_evaluation_takes_the_centre(size, first):
    """Between two pixels the upper and left one counts."""
    split, rows = make_split(4, 12), slice(first, first + size)
    ((images, _),) = EvalLoader(split, MEAN, STD, 5, 4, size=size)
    ((whole, _),) = EvalLoader(split, MEAN, STD, 5, 4)
    assert torch.equal(images, whole[:, :, rows, rows])


def test_a_plan_of_the_centre_can_be_captured():
    with Tape():
        plan = centred_plan(torch.arange(3), (12, 15), (9, 8))
    assert plan.crop.tolist() == [[1, 3]] * 3 and plan.crop.dtype == torch.int32


# --- options and errors ---------------------------------------------------------------------------------------------


def test_dtype_and_layout_reach_the_op():
    for loader in (make_loader(dtype=torch.bfloat16, channels_last=True).epoch(0),
                   EvalLoader(make_split(), MEAN, STD, 5, 8, dtype=torch.bfloat16, channels_last=True)):  # fmt: skip
        images = next(iter(loader))[0]
        assert images.dtype == torch.bfloat16 and images.is_contiguous(memory_format=torch.channels_last)


def test_description_names_the_path():
    assert "resident on cpu" in make_loader(workers=2).description
    text = make_loader(auto_augment=RAND, workers=2).description
    assert RAND in text and "2 worker processes" in text
    assert "main process" in make_loader(auto_augment=RAND).description


def test_wrong_arguments_are_named():
    with pytest.raises(DataError, match="batch of 64 is larger than the train split of 50.*--batch-size"):
        make_loader(batch_size=64)
    assert len(list(make_loader(batch_size=64, drop_last=False).epoch(0))) == 1
    for start in (-1, 7):
        with pytest.raises(ValueError, match=r"start must lie in 0\.\.6"):
            make_loader().epoch(0, start)
    with pytest.raises(ValueError, match="workers"):
        make_loader(workers=-1)
    with pytest.raises(ValueError, match="batch_size"):
        EvalLoader(make_split(), MEAN, STD, 5, 0)
    with pytest.raises(ValueError, match=r"0\.\.3, found 0\.\.4"):
        make_loader(num_classes=4)
    with pytest.raises(DataError, match="no images"):
        EvalLoader(make_split().subset(torch.arange(0)), MEAN, STD, 5, 8)


def test_workers_and_the_device_see_the_same_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that does nothing: resized crops, flips and reflected padding are the plan's, applied once."""
    monkeypatch.setattr(auto_augment.Policy, "__call__", lambda self, image: image)
    resized = replace(FULL, rrc=True, interpolation="random", vflip=0.5, hue=0.1)
    for recipe in (resized, replace(FULL, padding_mode="reflect")):
        resident, workers = make_loader(recipe), make_loader(recipe, auto_augment="ra")
        for (x, t), (y, u) in zip(resident.epoch(1), workers.epoch(1), strict=True):
            assert torch.equal(x, y) and torch.equal(t, u)


@pytest.mark.parametrize(("size", "rrc"), [(28, False), (32, False), (33, True), (224, True)])
def test_deit_paper_resizes_above_32_pixels(size: int, rrc: bool) -> None:
    config = parse(["--preset", "deit-paper"])
    split = Split(torch.zeros((4, 3, size, size), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    recipe = build_recipe(config.augmentation, SimpleNamespace(train=split, flips=True))
    assert (recipe.rrc, recipe.crop_pad) == (rrc, 0 if rrc else 4)
    assert recipe.scale == (0.08, 1.0) and recipe.interpolation == "bicubic" and recipe.hflip == 0.5


@pytest.mark.parametrize("flips", [True, False])
def test_flags_reach_the_recipe(flips: bool) -> None:
    asked = parse("--train-crop-mode rrc --scale 0.5 1 --hue 0.1 --vflip 0.5 --hflip 0.4 --grayscale-prob 0.2 "
                  "--alternating-flip --remode rand --reprob 0.1 --padding-mode reflect".split()).augmentation
    split = Split(torch.zeros((4, 3, 8, 8), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    recipe = build_recipe(asked, SimpleNamespace(train=split, flips=flips))
    assert recipe == Recipe(rrc=True, scale=(0.5, 1.0), hue=0.1, vflip=0.5 if flips else 0.0,
                            hflip=0.4 if flips else 0.0, grayscale=0.2, alternating_flip=True, remode="rand",
                            reprob=0.1, padding_mode="reflect")
