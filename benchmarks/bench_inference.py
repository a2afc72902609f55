"""Logits of the report's DeiT from one image and from 64: ours, ours frozen, plain PyTorch, timm's model.

All have the same weights, and beside the time stands, in `extra_info`, the largest distance of the logits from those
that `reference` computes in fp64. torch.compile, ONNX Runtime and OpenVINO stand beside them in `compare.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu.models import MODEL, timm_model
from torch import Tensor

from deit_fast import create_model, freeze, use_backend
from deit_fast.kernels import cpu as kernels
from deit_fast.models import VisionTransformer


def candidate(who: str, model: VisionTransformer) -> tuple[Callable[[Tensor], Tensor], str | None]:
    """(what computes the logits, the backend that it runs under)."""
    if who.startswith("frozen"):
        if kernels.why_not():
            pytest.skip(kernels.why_not())
        return freeze(model, torch.bfloat16 if who.endswith("bf16") else torch.float32), None
    if who == "timm":
        peer = timm_model()
        if peer is None:
            pytest.skip("timm is the peer: pip install -e '.[bench]'")
        peer.load_state_dict(model.state_dict())
        return peer.eval(), "reference"
    return model, None if who == "fused" else "reference"


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
