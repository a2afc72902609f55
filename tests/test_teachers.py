"""Distillation as DeiT does it: a frozen teacher that sees what the student sees, and errors before the first step."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from syncs import CountSyncs
from torch import nn

from deit_fast import create_model
from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import load_dataset
from deit_fast.errors import CheckpointError, ConfigError, DataError
from deit_fast.models.teacher import OnePixelConv2d, create_teacher, head_of, list_teachers, skeleton
from deit_fast.training import build, checkpoint, pretrained, teachers
from deit_fast.training.config import Config, DataConfig, DistillationConfig, OptimConfig, RunConfig
from deit_fast.training.distillation import Objective, Teacher, TeacherInput
from deit_fast.training.engine import Trainer
from deit_fast.training.job import Job
from deit_fast.training.optim import ModelEma
from deit_fast.training.progress import Log

CPU = torch.device("cpu")
SMALL = "shufflenet_v2_x0_5"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
IDENTITY = TeacherInput(MEAN, STD, MEAN, STD)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", input_size=8)


class Spy(nn.Module):
    """A network with batch norm that keeps what it was given."""

    def __init__(self, classes=10):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, classes)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.head(self.norm(images).mean((2, 3)))


def objective(kind="soft", tokens="cls+dist", teacher=None, **settings):
    config = DistillationConfig(distillation_type=kind, **settings)
    return Objective(tokens, config, teacher or Teacher(Spy(), IDENTITY))


def student():
    return create_model("deit_nano_distilled_patch4_32", 10, img_size=8, depth=2, drop_rate=0.0)


def config(digits_config=None, **distillation):
    return Config(data=DataConfig(data_set="digits", input_size=8), distillation=DistillationConfig(
        **{"teacher_model": SMALL, "teacher_epochs": 1, **distillation}), run=RunConfig(device="cpu", log_interval=100))


# Point 9: (1 - alpha) CE(cls, y) + alpha D(dist, teacher); each head sees its own teacher only.

def batch():
    return torch.randn(4, 3, 8, 8), F.one_hot(torch.tensor([1, 2, 3, 4]), 10).float()


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("reduction", ["batchmean", "numel"])
def test_objective_is_the_textbook_formula(kind, reduction):
    """Points 9 to 11: soft with tau^2 and its two reductions, hard with neither temperature nor smoothing."""
    images, targets = batch()
    targets = 0.7 * targets + 0.3 * targets.flip(0)  # MixUp's targets stay with the class head
    cls, dist = torch.randn(2, 4, 10, dtype=torch.float64)
    goal = objective(kind, distillation_alpha=0.3, distillation_tau=2.0, distillation_reduction=reduction)
    teacher = goal.teacher(images).double()
    if kind == "soft":
        p, log_q = (teacher / 2).softmax(1), (dist / 2).log_softmax(1)
        learned = 4 * (p * (p.log() - log_q)).sum() / (4 if reduction == "batchmean" else 40)
    else:
        learned = -dist.log_softmax(1)[range(4), teacher.argmax(1)].mean()
    expected = 0.7 * -(targets * cls.log_softmax(1)).sum(1).mean() + 0.3 * learned
    torch.testing.assert_close(goal(images, (cls.float(), dist.float()), targets), expected.float())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_heads_do_not_see_each_others_teacher(kind):
    images, targets = batch()
    cls, dist = (torch.randn(4, 10, requires_grad=True) for _ in range(2))
    goal = objective(kind, distillation_alpha=0.5)
    grads = torch.autograd.grad(goal(images, (cls, dist), targets), (cls, dist))
    other = torch.autograd.grad(goal(images, (cls, dist), targets.flip(0)), (cls, dist))
    assert torch.equal(grads[1], other[1]) and not torch.equal(grads[0], other[0])
    goal.teacher = Teacher(Spy(), IDENTITY)
    other = torch.autograd.grad(goal(images, (cls, dist), targets), (cls, dist))
    assert torch.equal(grads[0], other[0]) and not torch.equal(grads[1], other[1])


def test_one_head_and_two_label_heads():
    """cls+cls learns the mean of two cross-entropies and evaluates the mean of the logits."""
    images, targets = batch()
    model = create_model("vit_nano_patch4_32", 10, tokens="cls+cls", img_size=8, depth=2, drop_rate=0.0)
    cls, second = model(images)
    goal = objective("none", "cls+cls")
    expected = (F.cross_entropy(cls, targets) + F.cross_entropy(second, targets)) / 2
    torch.testing.assert_close(goal(images, (cls, second), targets), expected)
    assert not goal.teacher.network.seen
    torch.testing.assert_close(model.eval()(images), (cls + second) / 2)
    torch.testing.assert_close(objective("none", "cls")(images, cls, targets), F.cross_entropy(cls, targets))


# Points 12 to 14: the very batch of the student, no gradients, evaluation mode, its own normalisation and size.

def test_teacher_sees_the_students_tensor(digits):
    """After crop, flip, erasing and mixing: the tensor that the student gets."""
    recipe = Recipe(crop_pad=1, reprob=0.5, mixup=0.8, cutmix=1.0)
    loader = build.TrainLoader(digits.train, recipe, digits.mean, digits.std, 10, 16)
    given = []
    model = student()
    model.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    goal = objective()
    trainer = Trainer(Job("m", model, goal, loader, {}, 10, None, {}), OptimConfig(), RunConfig(), CPU, Log())
    next(trainer.steps.epoch(0, 0))
    assert goal.teacher.network.seen[0] is given[0]


def test_teacher_is_frozen_whatever_its_parent_does():
    spy = Spy()
    teacher = Teacher(spy, IDENTITY)
    before = {name: tensor.clone() for name, tensor in spy.state_dict().items()}
    parent = nn.ModuleList([teacher]).train()
    images = torch.randn(4, 3, 8, 8, requires_grad=True)
    logits = teacher(images)
    assert not teacher.training and not any(module.training for module in parent[0].modules())
    assert not logits.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in spy.state_dict().items()), "batch norm moved"


def test_teacher_is_no_part_of_the_student(tmp_path):
    """Not in the optimizer, the average or a checkpoint; a step reads no value on the host."""
    model, goal = student(), objective()
    ema = ModelEma(model, 0.9)
    loader = type("Stub", (), {"batch_size": 4, "recipe": Recipe(), "__len__": lambda self: 2})()
    job = Job("m", model, goal, loader, {}, 10, tmp_path, {}, ema=ema)
    trainer = Trainer(job, OptimConfig(), RunConfig(), CPU, Log())
    frozen = {name: tensor.clone() for name, tensor in goal.teacher.state_dict().items()}
    images, targets = batch()
    with CountSyncs() as counting:
        trainer.learner.learn(0, images, targets)
        trainer.learner.update(1e-3)
    assert counting.reads == 0
    trainer.save()
    optimized = {id(p) for group in trainer.learner.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters()}
    state = checkpoint.load(trainer.last)
    assert state["model"].keys() == state["ema"]["module"].keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in goal.teacher.state_dict().items())


def test_renormalisation_is_exact():
    """The teacher gets (pixel - its mean) / its std, from the student's (pixel - mean) / std."""
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    own_mean, own_std = teachers.IMAGENET
    normalise = torchvision.transforms.functional.normalize
    given = TeacherInput(MEAN, STD, own_mean, own_std).double()(normalise(pixels, MEAN, STD))
    torch.testing.assert_close(given, normalise(pixels, own_mean, own_std), rtol=1e-6, atol=1e-6)
    assert IDENTITY(pixels) is pixels


def test_resizing():
    images = torch.rand(2, 3, 8, 8)
    resized = TeacherInput(MEAN, STD, MEAN, STD, input_size=20)(images)
    assert resized.shape == (2, 3, 20, 20)
    assert torch.equal(resized, F.interpolate(images, (20, 20), mode="bicubic", antialias=True))
    assert TeacherInput(MEAN, STD, MEAN, STD, input_size=8)(images) is images


# Points 15 and 16: weights are the complement of each other (above); everything that cannot work is said at the start.

def test_non_distilled_model_with_distillation():
    with pytest.raises(ConfigError, match=r"--distillation-type soft needs a distillation token.*distilled"):
        replace(config(), model=replace(Config().model, model="vit_nano_patch4_32"))


@pytest.mark.parametrize(("name", "stem", "head"), [
    ("resnet18", "cifar", "fc.weight"), ("squeezenet1_1", "imagenet", "classifier.1.weight"),
    ("vit_b_16", "imagenet", "heads.head.weight"), ("densenet121", "imagenet", "classifier.weight"),
    ("inception_v3", "imagenet", "fc.weight"), ("regnet_y_400mf", "imagenet", "fc.weight"),
    ("googlenet", "imagenet", "fc.weight")])
def test_the_head_of_an_architecture(name, stem, head):
    assert head_of(name, stem) == head


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_teachers() if name != "regnet_y_128gf"])  # 2.6 GB of weights
def test_every_teacher_has_a_head_and_a_size(name):
    size = 299 if name == "inception_v3" else 224
    assert skeleton(name, 7).eval()(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)
    assert head_of(name)


def save_teacher(path, classes=10, reorder=False, **extra):
    weights = create_teacher(SMALL, classes).state_dict()
    if reorder:  # so that the last tensor of the file is not the head's bias
        weights = dict(sorted(weights.items(), reverse=True))
    torch.save({"state_dict": weights, **extra}, path)


def test_foreign_teacher(digits, tmp_path):
    """Anybody's state dict, in any order of its tensors; its accuracy is measured, and a bad one is named."""
    path, lines = tmp_path / "theirs.pth", []
    save_teacher(path, reorder=True)
    teacher, report = teachers.prepare_teacher(config(teacher_path=str(path)), digits, CPU, lines.append)
    assert report.source == str(path) and report.split == "val" and 0 <= report.top1 <= 1
    assert f"val top-1 {report.top1:.4f}" in lines[0]
    assert any("hardly better than chance" in line for line in lines)
    with torch.no_grad():
        images, labels = next(iter(build.build_eval_loaders(config(), digits, CPU)["val"]))
        assert report.top1 == pytest.approx((teacher(images).argmax(1) == labels).float().mean().item(), abs=1e-6)


@pytest.mark.parametrize(("classes", "settings", "message"), [
    (7, {}, r"the teacher has 7 classes, the data set digits has 10"),
    (10, {"teacher_model": "resnet18"}, r"does not fit --teacher-model resnet18"),
    (10, {"teacher_model": "resnet19"}, r"no teacher 'resnet19'. Nearest of torchvision's: resnet18"),
    (10, {"teacher_stem": "cifar"}, r"has no CIFAR stem"),
    (10, {"teacher_model": "vit_b_16"}, r"--teacher-input-size"),
])
def test_teachers_that_cannot_serve(digits, tmp_path, classes, settings, message):
    path = tmp_path / "theirs.pth"
    save_teacher(path, classes, reorder=True)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        teachers.prepare_teacher(config(teacher_path=str(path), **settings), digits, CPU, Log())


@pytest.mark.parametrize(("settings", "message"), [
    ({"teacher_batch_size": 1}, "--teacher-batch-size"), ({"teacher_model": "inception_v3"}, "--teacher-input-size"),
    ({"teacher_model": "alexnet"}, "--teacher-input-size")])
def test_teachers_that_cannot_be_trained(digits, tmp_path, settings, message):
    """Batch norm over one value, images smaller than a kernel: said before the training, in one sentence."""
    with pytest.raises(ConfigError, match=message):
        teachers.prepare_teacher(config(teacher_cache=str(tmp_path), **settings), digits, CPU, Log())


def test_a_trained_teacher_is_found_again(digits, tmp_path):
    """Same key, same teacher; another seed, recipe or data set is another. A checkpoint of ours is a --teacher-path."""
    ours = config(teacher_cache=str(tmp_path))
    first, report = teachers.prepare_teacher(ours, digits, CPU, Log())
    second, again = teachers.prepare_teacher(ours, digits, CPU, Log())
    assert report.source.startswith("trained") and again.source.startswith("from") and report.top1 == again.top1
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(first(images), second(images))
    others = [config(teacher_epochs=2), config(teacher_lr=0.2), config(teacher_model="resnet18"),
              replace(ours, data=replace(ours.data, data_seed=1)), replace(ours, run=replace(ours.run, amp=True))]
    keys = {teachers.teacher_identity(other, digits, CPU) for other in others}
    keys.add(teachers.teacher_identity(ours, replace(digits, fingerprint="0"), CPU))
    assert len(keys) == 6 and teachers.teacher_identity(ours, digits, CPU) not in keys
    folder = next(tmp_path.iterdir())
    for name in ("done.pt", "best.pt"):
        third, given = teachers.prepare_teacher(config(teacher_path=str(folder / name)), digits, CPU, Log())
        assert torch.equal(first(images), third(images)) and given.top1 == report.top1
    with pytest.raises(CheckpointError, match=f"Pass --teacher-model {SMALL}"):
        wrong = config(teacher_path=str(folder / "done.pt"), teacher_model="resnet18")
        teachers.prepare_teacher(wrong, digits, CPU, Log())


@pytest.mark.parametrize(("counts", "top1", "warns"), [
    ([50, 50], 0.95, False), ([50, 50], 0.52, True), ([90, 10], 0.9, True), ([90, 10], 0.97, False),
    ([10] * 10, 0.15, True), ([10] * 10, 0.5, False), ([1] * 100, 0.1, False), ([1] * 100, 0.015, True)])
def test_a_teacher_that_guesses_is_warned_of(counts, top1, warns):
    """Chance is the share of the largest class; of two classes, every teacher is below twice that."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert teachers.hardly_better_than_chance(top1, labels) == warns


def test_another_teacher_file_is_another_run(digits, tmp_path):
    def identity(path):
        return teachers.teacher_identity(config(teacher_path=str(path)), digits, CPU)

    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    save_teacher(a)
    save_teacher(b)
    assert identity(a) != identity(b)
    b.write_bytes(a.read_bytes())
    assert identity(a) == identity(b)


@pytest.mark.parametrize(("device", "model", "size", "stem"), [
    ("cpu", "resnet18", 32, "imagenet"), ("cuda", "resnet18", 32, "cifar"), ("cuda", "resnet18", 224, "imagenet"),
    ("cuda", SMALL, 32, "imagenet")])
def test_the_stem_by_device(device, model, size, stem):
    assert teachers.resolve_stem(DistillationConfig(teacher_model=model), torch.device(device), size) == stem


# --teacher-weights DEFAULT

def test_pretrained_weights_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "unreachable", lambda url, seconds: f"no answer within {seconds:g} s")
    with pytest.raises(DataError) as caught:
        pretrained.pretrained_weights("resnet18")
    message = str(caught.value)
    assert "no answer within 4 s" in message and "resnet18-" in message
    assert str(tmp_path) in message and "--teacher-weights none" in message and "--teacher-path" in message


def test_pretrained_weights_start_the_teacher(monkeypatch, tmp_path, digits):
    """All of torchvision's tensors but the head's are taken over, and images are normalised as ImageNet's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = torchvision.models.get_model(SMALL).state_dict()
    url = torchvision.models.get_model_weights(SMALL).DEFAULT.url
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    path = tmp_path / "hub/checkpoints" / re.search(r"[^/]+$", url)[0]
    torch.save(theirs, path)
    ours = create_teacher(SMALL, 10, pretrained=pretrained.pretrained_weights(SMALL)).state_dict()
    assert ours["fc.weight"].shape == (10, 1024)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if not name.startswith("fc."))
    pretraining = config(teacher_weights="DEFAULT", teacher_cache=str(tmp_path))
    teacher, _ = teachers.prepare_teacher(pretraining, digits, CPU, Log())
    assert not teacher.input.same
    path.write_bytes(b"not weights")
    with pytest.raises(DataError, match="could not be loaded"):
        pretrained.pretrained_weights(SMALL)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "direct"), [
    (1, 3, 1, 1, True), (2, 3, 2, 1, True), (1, 5, 1, 2, True), (1, 1, 1, 0, True), (3, 3, 3, 1, False),
    (2, 3, 1, 1, False), (2, 1, 2, 0, False)])
def test_a_convolution_to_one_pixel_is_a_matrix_product(monkeypatch, size, kernel, stride, padding, direct):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, kernel, stride, padding).double()
    ours = copy.deepcopy(plain)
    ours.__class__ = OnePixelConv2d
    x = torch.randn(3, 6, size, size, dtype=torch.float64)
    results = {}
    for layer in (plain, ours):
        images = x.clone().requires_grad_()
        with monkeypatch.context() as patch:
            if layer is ours and direct:
                patch.setattr(nn.Conv2d, "forward", None)
            y = layer(images)
        results[layer] = (y, *torch.autograd.grad((y * y).sum(), (images, *layer.parameters())))
    for a, b in zip(results[plain], results[ours], strict=True):
        torch.testing.assert_close(a, b)


def test_resnets_end_in_convolutions_to_one_pixel():
    network = create_teacher("resnet18", 10)
    assert all(type(module) is OnePixelConv2d for name, module in network.named_modules() if name.endswith("conv2"))
    assert type(create_teacher("mobilenet_v2", 10).features[1].conv[0][0]) is nn.Conv2d  # of groups: left alone
