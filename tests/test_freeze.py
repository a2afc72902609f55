"""A frozen model computes what the model's evaluation does, keeps copies, and refuses what it would get wrong."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from needs import needs_cpu
from oracle import assert_within_budget
from test_encoder_block import stack
from torch import Tensor, nn

from deit_fast import BackendError, create_model, freeze, ops, use_backend
from deit_fast.kernels import cpu
from deit_fast.models import VisionTransformer
from deit_fast.ops.encoder import freeze_encoder

pytestmark = needs_cpu


def fresh(name: str = "deit_nano_distilled_patch4_32", **settings: object) -> VisionTransformer:
    """A model in evaluation mode whose every parameter matters."""
    torch.manual_seed(5)
    model = create_model(name, **{"depth": 2, **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def evaluated(model: VisionTransformer, images: Tensor, autocast: bool = False) -> Tensor:
    with torch.no_grad(), use_backend("reference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_its_blocks_bit_for_bit(depth: int, dtype: torch.dtype) -> None:
    x, blocks = stack(depth, dtype)
    frozen = freeze_encoder(blocks, 3, 1e-6, dtype)
    for stream in (x, x[:1], torch.cat([x, x])[:, :5].contiguous(), x[:0]):
        assert torch.equal(frozen(stream), ops.encoder(stream, blocks, 3, backend="cpu"))


MODELS = {"two heads": {}, "one head": {"tokens": "cls"}, "two class tokens": {"tokens": "cls+cls"},
          "no head": {"num_classes": 0}, "another size": {"img_size": 48, "patch_size": 16, "in_chans": 1},
          "odd": {"embed_dim": 21, "num_heads": 3, "mlp_ratio": 1.5, "qkv_bias": False, "num_classes": 3, "depth": 1}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_its_logits(settings: dict, dtype: torch.dtype) -> None:
    model = fresh(**settings)
    frozen = freeze(model, dtype)
    side, channels = settings.get("img_size", 32), settings.get("in_chans", 3)
    for batch in (1, 3, 0):
        images = torch.randn(batch, channels, side, side)
        logits, again = frozen(images), frozen(images.to(memory_format=torch.channels_last))
        assert torch.equal(logits, again) and logits.dtype == torch.float32 and not logits.requires_grad
        truth = evaluated(copy.deepcopy(model).double(), images.double())
        assert_within_budget("logits", logits, truth, evaluated(model, images, dtype == torch.bfloat16).float())


def test_without_biases() -> None:
    model, images = fresh(), torch.randn(2, 3, 32, 32)
    model.patch_embed.proj.bias = model.head.bias = model.blocks[1].mlp.fc1.bias = None
    truth = evaluated(copy.deepcopy(model).double(), images.double())
    assert_within_budget("logits", freeze(model)(images), truth, evaluated(model, images))


def test_a_bf16_model_is_frozen_in_bf16() -> None:
    model = fresh().bfloat16()
    assert freeze(model).dtype == torch.bfloat16 and freeze(fresh()).dtype == torch.float32
    images = torch.randn(2, 3, 32, 32)
    truth = evaluated(copy.deepcopy(model).double(), images.double())
    assert_within_budget("logits", freeze(model)(images), truth, evaluated(model, images.bfloat16()).float())


def test_it_is_a_snapshot() -> None:
    model, images = fresh(), torch.randn(2, 3, 32, 32)
    frozen = freeze(model)
    before = frozen(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert torch.equal(frozen(images), before) and not torch.equal(freeze(model)(images), before)
    del model
    with torch.autocast("cpu", torch.bfloat16):  # its dtype was chosen when it was frozen
        assert torch.equal(frozen(images), before)


def test_several_threads_call_it() -> None:
    frozen, images = freeze(fresh()), [torch.randn(1 + i, 3, 32, 32) for i in range(4)]
    alone, wrong = [frozen(batch) for batch in images], []

    def call(batch: Tensor, expected: Tensor) -> None:
        wrong.extend(i for i in range(20) if not torch.equal(frozen(batch), expected))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(images, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class OwnHead(nn.Linear):
    """Somebody's own part."""


def change(model: VisionTransformer, what: str) -> VisionTransformer:
    """The model, changed so that it cannot be frozen."""
    match what:
        case "training":
            model.train()
        case "head" | "head_dist":
            setattr(model, what, OwnHead(64, 10))
        case "hook":
            model.register_forward_hook(lambda *_: None)
        case "block's hook":
            model.blocks[1].register_forward_hook(lambda *_: None)
        case "part's hook":
            model.patch_embed.register_forward_pre_hook(lambda *_: None)
        case "block":
            model.blocks[0] = nn.Identity()
        case "forward":
            model.forward = lambda images: images
        case "device":
            model.to("meta")
        case "no blocks":
            model.blocks = nn.ModuleList()
    return model


@pytest.mark.parametrize("what, words", [
    ("training", "call model.eval"), ("head", "head is a OwnHead"),
    ("head_dist", "head_dist is a OwnHead"), ("hook", "hooks"), ("block's hook", "hooks"),
    ("part's hook", "hooks"), ("block", "changed blocks"), ("forward", "hooks"), ("device", "on meta"),
    ("no blocks", "no blocks")])
def test_models_that_it_would_get_wrong(what: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        freeze(change(fresh(), what))


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    with pytest.raises(TypeError, match="must be a VisionTransformer of deit_fast, got Linear"):
        freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        freeze(model, torch.float16)
    with pytest.raises(TypeError, match="must be float32"):  # a model of 16-bit parameters is not widened
        freeze(copy.deepcopy(model).bfloat16(), torch.float32)
    frozen = freeze(model)
    for images in (torch.zeros(3, 32, 32), torch.zeros(1, 3, 28, 28), torch.zeros(1, 1, 32, 32),
                   torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 3, 32, 32, device="meta")):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\) floating point on the CPU"):
            frozen(images)
    monkeypatch.setattr(cpu, "_reason", "it is not built")
    with pytest.raises(BackendError, match="encoder: backend 'cpu' cannot serve this call: it is not built"):
        freeze(model)
