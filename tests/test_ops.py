"""What the public ops refuse, and in which words; what they accept under autocast and without biases."""

from __future__ import annotations

import re

import pytest
import torch

from deit_fast import BackendError, backend, create_model, ops, use_backend


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


LN, W, B = (ones(8), ones(8)), ones(4, 8), ones(4)
MLP = (ones(16, 8), ones(16), ones(8, 16), ones(8))
SEED = torch.tensor(0)


def block(**change: object) -> torch.Tensor:
    """A good call of encoder_block but for what `change` says."""
    call = {"x": ones(2, 3, 8), "ln1_weight": ones(8), "ln1_bias": None, "qkv_weight": ones(24, 8), "qkv_bias": ones(24),
            "proj_weight": ones(8, 8), "proj_bias": None, "ln2_weight": ones(8), "ln2_bias": ones(8),
            "fc1_weight": MLP[0], "fc1_bias": MLP[1], "fc2_weight": MLP[2], "fc2_bias": MLP[3], "num_heads": 2}
    return ops.encoder_block(**{**call, **change})


BAD_CALLS = [
    (lambda: ops.attention(ones(2, 66, 190), 8), ValueError,
     "attention: qkv must have shape (B, N, 3*C) with C divisible by num_heads=8, got (2, 66, 190)."),
    (lambda: ops.attention(ones(2, 0, 24), 1), ValueError, "attention: qkv must have shape"),
    (lambda: ops.attention(ones(2, 24), 1), ValueError, "attention: qkv must have shape"),
    (lambda: ops.attention(ones(2, 3, 24), 0), ValueError, "attention: num_heads must be at least 1, got 0."),
    (lambda: ops.attention(ones(2, 3, 24), 1, dropout_p=1.0), ValueError, "dropout_p must be in [0, 1), got 1.0"),
    (lambda: ops.attention(ones(2, 3, 24, dtype=torch.int64), 1), TypeError, "qkv must be float32"),
    (lambda: ops.attention(None, 1), TypeError, "qkv must be a tensor, got NoneType"),
    (lambda: ops.attention(ones(2, 3, 24), 1, dropout_p=0.1, seed=torch.tensor(1.0)), TypeError, "seed must be a 0-dim int64"),
    (lambda: ops.attention(ones(2, 3, 24), 1, dropout_p=0.1, seed=torch.tensor([1])), ValueError, "seed must be a 0-dim int64"),
    (lambda: ops.layernorm_linear(ones(3, 9), *LN, W, B), ValueError, "weight must have shape (F, 9), got (4, 8)."),
    (lambda: ops.layernorm_linear(ones(3, 8), ones(9), None, W, B), ValueError, "ln_weight must have shape (8,), got (9,)."),
    (lambda: ops.layernorm_linear(ones(3, 8), *LN, W, ones(5)), ValueError, "bias must have shape (4,), got (5,)."),
    (lambda: ops.layernorm_linear(ones(3, 8), *LN, W.double(), B), TypeError, "weight must be float32 or of the activations'"),
    (lambda: ops.layernorm_linear(ones(3, 0), *LN, W, B), ValueError, "with C > 0, got (3, 0)"),
    (lambda: ops.layernorm_linear(ones(3, 8), *LN, W.to("meta"), B), ValueError, "weight must be on cpu like the activations"),
    (lambda: ops.linear_residual(ones(2, 3, 8), W, B, ones(2, 3, 5)), ValueError,
     "residual must have shape (2, 3, 4), got (2, 3, 5)."),
    (lambda: ops.linear_residual(ones(2, 3, 8), W, B, ones(2, 3, 4, dtype=torch.float64)), ValueError, "residual must have the dtype"),
    (lambda: ops.linear_residual(ones(2, 3, 8), W, B, ones(2, 3, 4), row_scale=ones(3)), ValueError,
     "row_scale must have shape (2,), got (3,)."),
    (lambda: ops.layernorm_mlp(ones(2, 8), *LN, *MLP, row_scale=ones(2, 1)), ValueError, "row_scale must have shape (2,)"),
    (lambda: ops.layernorm_mlp(ones(2, 8), *LN, ones(16, 8), ones(16), ones(8, 15), ones(8)), ValueError,
     "fc2_weight must have shape (8, 16), got (8, 15)."),
    (lambda: ops.layernorm_mlp(ones(2, 8), *LN, *MLP, dropout_p=-0.1), ValueError, "dropout_p must be in [0, 1)"),
    (lambda: block(x=ones(2, 3)), ValueError,
     "encoder_block: x must have shape (B, N, C) with C divisible by num_heads=2, got (2, 3)."),
    (lambda: block(x=ones(2, 0, 8)), ValueError, "encoder_block: x must have shape (B, N, C)"),
    (lambda: block(num_heads=3), ValueError, "with C divisible by num_heads=3, got (2, 3, 8)"),
    (lambda: block(num_heads=2.0), TypeError, "encoder_block: num_heads must be an integer, got float."),
    (lambda: block(qkv_weight=ones(16, 8)), ValueError, "encoder_block: qkv_weight must have shape (24, 8), got (16, 8)."),
    (lambda: block(proj_weight=None), TypeError, "encoder_block: proj_weight must be a tensor, got NoneType."),
    (lambda: block(fc1_weight=ones(8)), ValueError, "fc1_weight must have shape (F, 8), got (8,)."),
    (lambda: block(fc2_weight=ones(8, 15)), ValueError, "fc2_weight must have shape (8, 16), got (8, 15)."),
    (lambda: block(attn_dropout_p=1.0), ValueError, "encoder_block: attn_dropout_p must be in [0, 1), got 1.0."),
    (lambda: block(mlp_row_scale=ones(3)), ValueError, "encoder_block: mlp_row_scale must have shape (2,), got (3,)."),
    (lambda: block(backend="cuda"), BackendError, "encoder_block: backend 'cuda' is not offered. Usable here: reference"),
    (lambda: ops.distillation_loss(ones(2, 3), None, torch.tensor([0, 1]), kind="soft"), ValueError,
     "kind='soft' needs dist_logits; use a distilled model and a teacher"),
    (lambda: ops.distillation_loss(ones(2, 3), ones(2, 3), torch.tensor([0, 1]), kind="hard"), ValueError, "needs teacher_logits"),
    (lambda: ops.distillation_loss(ones(2, 3), ones(2, 3), torch.tensor([0, 1]), ones(2, 4), kind="hard"), ValueError,
     "teacher_logits must have shape (2, 3) like cls_logits, got (2, 4)."),
    (lambda: ops.distillation_loss(ones(2, 3), None, ones(2, 3), smoothing=0.1), ValueError, "smoothing must be 0 with soft targets"),
    (lambda: ops.distillation_loss(ones(2, 3), None, torch.tensor([0, 1]), kind="sotf"), ValueError, "kind must be one of none, soft"),
    (lambda: ops.distillation_loss(ones(2, 3), None, torch.tensor([0])), ValueError, "target must have shape (2,), got (1,)."),
    (lambda: ops.distillation_loss(ones(2, 3), None, torch.tensor([0, 1], dtype=torch.int32)), TypeError, "target must be int64"),
    (lambda: ops.distillation_loss(ones(2, 3), None, torch.tensor([0, 1]), tau=0.0), ValueError, "tau must be positive"),
    (lambda: ops.distillation_loss(ones(2, 3), None, torch.tensor([0, 3])), IndexError, "out of bounds"),
    (lambda: ops.attention(ones(2, 3, 24), 1, backend="cuda"), BackendError, "attention: backend 'cuda' is not offered. Usable"),
    (lambda: ops.attention(ones(2, 3, 24), 1, backend="cdua"), BackendError, "there is no backend 'cdua'"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_calls(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_use_backend_refuses_unknown_names() -> None:
    with pytest.raises(BackendError, match="there is no backend 'gpu'"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="there is no op 'attn'"), use_backend(attn="reference"):
        pass


def test_environment_names_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """DEIT_FAST_BACKEND="triton,attention=reference"; a misspelt name raises at the call, not at import."""
    parsed = backend._parse_environment("triton, attention=reference")
    assert parsed == {"*": "triton", "attention": "reference"}
    monkeypatch.setattr(backend, "_environment", backend._parse_environment("tritn"))
    with pytest.raises(BackendError, match="there is no backend 'tritn'. Known: reference, cpu, triton, cuda."):
        ops.attention(ones(2, 3, 24), 1)
    with use_backend("reference"):
        ops.attention(ones(2, 3, 24), 1)


def test_autocast_casts_activations_and_keeps_fp64() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.layernorm_linear(ones(3, 8), *LN, W, B).dtype == torch.bfloat16
        assert ops.linear_residual(ones(2, 8), ones(8, 8), None, ones(2, 8)).dtype == torch.bfloat16
        assert ops.distillation_loss(ones(2, 3, dtype=torch.bfloat16), None, torch.tensor([0, 1])).dtype == torch.float32
        assert ops.attention(ones(1, 2, 12, dtype=torch.float64), 1).dtype == torch.float64
    assert ops.layernorm_linear(ones(3, 8), *LN, W, B).dtype == torch.float32


def test_parameters_must_fit_what_autocast_makes_of_x() -> None:
    """fp16 parameters beside activations that are about to be bf16: no kernel may take their bits for fp32."""
    half = [t.half() for t in (*LN, W, B)]
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="must be float32 or of the activations' dtype torch.bfloat16, got torch.float16"):
            ops.layernorm_linear(ones(3, 8, dtype=torch.float16), *half)
        assert ops.layernorm_linear(ones(3, 8), *(t.bfloat16() for t in (*LN, W, B))).dtype == torch.bfloat16


def test_teacher_gets_no_gradient() -> None:
    teacher = torch.randn(2, 3, requires_grad=True)
    cls, dist = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    ops.distillation_loss(cls, dist, torch.tensor([0, 1]), teacher, "soft").backward()
    assert teacher.grad is None and cls.grad is not None and dist.grad is not None


def test_the_meta_device_gives_shapes() -> None:
    """The automatic order computes nothing there; the C++ kernels say that they cannot."""
    model = create_model("deit_nano_distilled_patch4_32", depth=1, device="meta")
    cls, dist = model(torch.empty(2, 3, 32, 32, device="meta"))
    assert cls.shape == dist.shape == (2, 10) and cls.device.type == "meta"
    with pytest.raises(BackendError, match="on meta, not on the CPU|CPU extension"):
        ops.attention(torch.empty(1, 2, 12, device="meta"), 1, backend="cpu")


def test_a_layernorm_s_parameters_may_differ_in_dtype() -> None:
    x, mixed = torch.randn(3, 8).bfloat16(), (LN[0], LN[1].bfloat16())
    torch.testing.assert_close(ops.layernorm_linear(x, *mixed, W, B, backend="reference"),
                               ops.layernorm_linear(x, *LN, W, B, backend="reference"))
