"""The reference against formulas written out by somebody else: PyTorch's own modules, NumPy, and published test vectors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deit_fast import reference
from deit_fast.reference.philox import keep_mask, philox4x32

# Salmon et al. 2011, the known answers that ship with Random123: (counter, key, words).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words) -> None:
    drawn = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in drawn) == words


def test_keep_mask_follows_its_counter_layout() -> None:
    """Element i is word i % 4 of counter (i // 4, 0, site, 0); the shape does not matter, and p is a threshold."""
    seed = torch.tensor(5 + (9 << 32))
    mask = keep_mask((3, 7), 0.25, seed, site=2)
    for i in (0, 1, 4, 6, 20):
        word = philox4x32((torch.tensor([i // 4]), 0, 2, 0), (5, 9))[i % 4]
        assert mask.flatten()[i] == (int(word) >= 2**30)
    assert torch.equal(keep_mask((21,), 0.25, seed, 2), mask.flatten())
    assert not torch.equal(keep_mask((3, 7), 0.25, seed, 3), mask)
    assert not torch.equal(keep_mask((3, 7), 0.25, seed + 1, 2), mask)


def test_keep_mask_rate() -> None:
    kept = keep_mask((200_000,), 0.1, torch.tensor(-3), site=0).double().mean().item()
    assert abs(kept - 0.9) < 4 * math.sqrt(0.09 / 200_000)


def test_attention_is_torch_multihead_attention() -> None:
    B, N, C, H = 3, 11, 24, 4
    module = nn.MultiheadAttention(C, H, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, N, C, dtype=torch.float64)
    qkv = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    ours = module.out_proj(reference.attention(qkv, H))
    torch.testing.assert_close(ours, module(x, x, x, need_weights=False)[0])


def test_attention_dropout_drops_probabilities() -> None:
    """The seeded path, with V the identity, returns the dropped and rescaled softmax itself."""
    N, p, seed = 8, 0.4, torch.tensor(11)
    q, k = torch.randn(2, 1, N, N, dtype=torch.float64)
    qkv = torch.cat([q, k, torch.eye(N, dtype=torch.float64)[None]], dim=-1)
    plain = reference.attention(qkv, 1)
    dropped = reference.attention(qkv, 1, dropout_p=p, seed=seed)
    mask = keep_mask((1, 1, N, N), p, seed, site=0)[0]
    torch.testing.assert_close(dropped, plain * mask / (1 - p))
    assert 0 < mask.sum() < N * N


def test_encoder_block_is_torch_encoder_layer() -> None:
    """The four ops in a row equal PyTorch's pre-norm encoder layer."""
    C, H, FF, eps = 16, 2, 40, 1e-6
    layer = nn.TransformerEncoderLayer(C, H, FF, 0.0, "gelu", eps, batch_first=True, norm_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, C, dtype=torch.float64)
    attn = layer.self_attn
    y = reference.layernorm_linear(x, layer.norm1.weight, layer.norm1.bias, attn.in_proj_weight, attn.in_proj_bias, eps)
    y = reference.linear_residual(reference.attention(y, H), attn.out_proj.weight, attn.out_proj.bias, x)
    y = reference.layernorm_mlp(y, layer.norm2.weight, layer.norm2.bias, layer.linear1.weight, layer.linear1.bias,
                                layer.linear2.weight, layer.linear2.bias, eps)
    torch.testing.assert_close(y, layer.train()(x))


def test_dropout_sites_and_row_scale() -> None:
    """linear_residual draws site 1, layernorm_mlp sites 2 and 3; row_scale multiplies whole samples, after dropout."""
    seed, p = torch.tensor(7), 0.5
    x, eye, zero = torch.ones(2, 3, 4), torch.eye(4), torch.zeros(2, 3, 4)
    scale = torch.tensor([0.0, 2.0])
    out = reference.linear_residual(x, eye, None, zero, p, seed, scale)
    torch.testing.assert_close(out, keep_mask((2, 3, 4), p, seed, 1) * 2.0 * scale.view(2, 1, 1))
    x = torch.randn(2, 3, 4)
    ln = torch.ones(4)
    hidden = F.gelu(F.layer_norm(x, (4,), eps=1e-6)) * keep_mask((2, 3, 4), p, seed, 2) * 2.0
    expected = x + hidden * keep_mask((2, 3, 4), p, seed, 3) * 2.0 * scale.view(2, 1, 1)
    torch.testing.assert_close(reference.layernorm_mlp(x, ln, None, eye, None, eye, None, 1e-6, p, seed, scale), expected)


@pytest.mark.parametrize("reduction", ["batchmean", "numel"])
def test_soft_distillation_formula(reduction: str) -> None:
    """tau^2 sum q (log q - log p) over B or B K, by hand; K apart."""
    B, K, alpha, tau = 6, 5, 0.3, 3.0
    cls, dist, teacher = torch.randn(3, B, K, dtype=torch.float64)
    target = torch.randint(K, (B,))
    p, q = torch.softmax(dist / tau, -1), torch.softmax(teacher / tau, -1)
    kl = (q * (q.log() - p.log())).sum() / (B if reduction == "batchmean" else B * K)
    ce = -torch.log_softmax(cls, -1)[torch.arange(B), target].mean()
    loss = reference.distillation_loss(cls, dist, target, teacher, "soft", alpha, tau, reduction)
    torch.testing.assert_close(loss, (1 - alpha) * ce + alpha * tau**2 * kl)


def test_hard_distillation_is_never_smoothed() -> None:
    B, K = 6, 5
    cls, dist, teacher = torch.randn(3, B, K, dtype=torch.float64)
    target = torch.randint(K, (B,))
    smooth = torch.full((B, K), 0.1 / K, dtype=torch.float64).scatter_(1, target[:, None], 1 - 0.1 + 0.1 / K)
    ce = -(smooth * torch.log_softmax(cls, -1)).sum(-1).mean()
    hard = -torch.log_softmax(dist, -1)[torch.arange(B), teacher.argmax(-1)].mean()
    for given, smoothing in ((target, 0.1), (smooth, 0.0)):
        loss = reference.distillation_loss(cls, dist, given, teacher, "hard", 0.5, 3.0, smoothing=smoothing)
        torch.testing.assert_close(loss, (ce + hard) / 2)


def test_heads_do_not_mix() -> None:
    """The class head never sees the teacher, the distillation head never sees the labels (point 9)."""
    cls, dist, teacher = (torch.randn(4, 3, requires_grad=True) for _ in range(3))
    target = torch.tensor([0, 1, 2, 0])
    loss = reference.distillation_loss(cls, dist, target, teacher.detach(), "soft", 0.5, 2.0)
    dcls, ddist = torch.autograd.grad(loss, (cls, dist))
    other = reference.distillation_loss(cls, dist, (target + 1) % 3, teacher.detach() + torch.randn(4, 3), "soft", 0.5, 2.0)
    dcls_other, ddist_other = torch.autograd.grad(other, (cls, dist))
    assert not torch.allclose(dcls, dcls_other) and not torch.allclose(ddist, ddist_other)
    (dcls_teacher,) = torch.autograd.grad(
        reference.distillation_loss(cls, dist, target, torch.randn(4, 3), "soft", 0.5, 2.0), cls)
    (ddist_labels,) = torch.autograd.grad(
        reference.distillation_loss(cls, dist, (target + 1) % 3, teacher.detach(), "soft", 0.5, 2.0), dist)
    torch.testing.assert_close(dcls_teacher, dcls)
    torch.testing.assert_close(ddist_labels, ddist)


@pytest.mark.parametrize("name", ["layernorm_linear", "attention", "linear_residual", "layernorm_mlp", "encoder_block"])
def test_gradcheck(name: str) -> None:
    """Numerical differentiation in fp64, dropout and drop-path included."""
    def t(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    seed, row_scale = torch.tensor(3), torch.tensor([1.5, 0.5], dtype=torch.float64)
    inputs, extra = {
        "layernorm_linear": ((t(2, 3, 4), t(4), t(4), t(5, 4), t(5)), ()),
        "attention": ((t(2, 3, 12),), (2, 0.7, 0.3, seed)),
        "linear_residual": ((t(2, 3, 4), t(5, 4), t(5), t(2, 3, 5)), (0.3, seed, row_scale)),
        "layernorm_mlp": ((t(2, 3, 4), t(4), t(4), t(6, 4), t(6), t(4, 6), t(4)), (1e-6, 0.3, seed, row_scale)),
        "encoder_block": ((t(2, 3, 4), t(4), t(4), t(12, 4), t(12), t(4, 4), t(4), t(4), t(4), t(6, 4), t(6), t(4, 6), t(4)),
                          (2, 1e-6, 0.3, 0.2, seed, row_scale, row_scale.flip(0))),
    }[name]
    assert torch.autograd.gradcheck(lambda *args: getattr(reference, name)(*args, *extra), inputs)


@pytest.mark.parametrize("soft_target", [False, True])
@pytest.mark.parametrize(("kind", "reduction"), [("none", "batchmean"), ("soft", "batchmean"), ("soft", "numel"),
                                                 ("hard", "batchmean")])
def test_gradcheck_of_the_loss(kind: str, reduction: str, soft_target: bool) -> None:
    """Of both heads' logits, in fp64; labels are smoothed, the teacher gets no gradient."""
    cls, dist, teacher = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    target = torch.randn(4, 3, dtype=torch.float64).softmax(1) if soft_target else torch.tensor([0, 2, 1, 2])
    smoothing = 0.0 if soft_target else 0.1

    def loss(cls: torch.Tensor, dist: torch.Tensor) -> torch.Tensor:
        return reference.distillation_loss(cls, dist, target, teacher, kind, 0.3, 2.0, reduction, smoothing)

    leaves = [logits.requires_grad_(kind != "none" or logits is cls) for logits in (cls, dist)]
    assert torch.autograd.gradcheck(loss, leaves)
