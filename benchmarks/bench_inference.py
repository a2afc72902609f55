"""Logits of the report's DeiT from one image and from 64: ours, ours frozen, plain PyTorch, timm's model.

All have the same weights, and beside the time stands, in `extra_info`, the largest distance of the logits from those
that `reference` computes in fp64. torch.compile, ONNX Runtime and OpenVINO stand beside them in `compare.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deit_fast import create_model, freeze, use_backend
from deit_fast.kernels import cpu
from deit_fast.models import VisionTransformer

MODEL = "deit_nano_distilled_patch4_32"


def timm_model(ours: VisionTransformer) -> torch.nn.Module:
    """timm's model with our weights."""
    deit = pytest.importorskip("timm.models.deit", reason="timm is the peer: pip install -e '.[bench]'")
    model = deit.VisionTransformerDistilled(img_size=32, patch_size=4, embed_dim=64, depth=7, num_heads=8,
                                            num_classes=10)
    model.load_state_dict(ours.state_dict())
    return model.eval()


def candidate(who: str, model: VisionTransformer) -> tuple[Callable[[Tensor], Tensor], str | None]:
    """(what computes the logits, the backend that it runs under)."""
    if who.startswith("frozen"):
        if cpu.why_not():
            pytest.skip(cpu.why_not())
        return freeze(model, torch.bfloat16 if who.endswith("bf16") else torch.float32), None
    return timm_model(model) if who == "timm" else model, None if who == "fused" else "reference"


@pytest.mark.parametrize("who", ["fused", "frozen", "frozen bf16", "reference", "timm"])
@pytest.mark.parametrize("batch", [1, 64])
def test_inference(benchmark, batch: int, who: str) -> None:
    torch.manual_seed(0)
    model, images = create_model(MODEL).eval(), torch.randn(batch, 3, 32, 32)
    call, backend = candidate(who, model)
    benchmark.group = f"inference, {MODEL}, batch {batch}"
    with torch.inference_mode(), use_backend(backend):
        logits = benchmark.pedantic(lambda: call(images), rounds=40, iterations=5 if batch == 1 else 1, warmup_rounds=5)
    with torch.inference_mode(), use_backend("reference"):
        error = (model.double()(images.double()) - logits).abs().max().item()
    benchmark.extra_info.update(images_per_second=batch / benchmark.stats.stats.median, error=error)
    assert error < (2e-2 if who.endswith("bf16") else 1e-5), "these are not the model's logits"
