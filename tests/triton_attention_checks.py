"""Checks of attention's groups of heads in Triton's interpreter, in the process of test_triton_attention.py."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_fast import ops
from deit_fast.kernels.triton import attention, common
from deit_fast.reference import block
from deit_fast.reference.philox import keep_mask

SEED = torch.tensor(0x1234567_89ABCDEF)


def masks() -> None:
    """Equal logits and V = identity make dropout visible in groups of 2 and 4 heads: aligned and unaligned rows."""
    for N, H, D, heads in ((8, 4, 8, 4), (16, 4, 16, 2), (14, 4, 14, 2)):
        assert attention.heads_together(N, H, D, 2) == heads
        qkv = torch.zeros(2, N, 3, H, D, dtype=torch.float16)
        qkv[:, :, 2] = torch.eye(N, D)[None, :, None]
        out = ops.attention(qkv.view(2, N, -1), H, dropout_p=0.3, seed=SEED, backend="triton")
        mask = out.view(2, N, H, D).transpose(1, 2)[..., :N] > 0.5 / N  # (B, H, N, N)
        assert torch.equal(mask, keep_mask((2, H, N, N), 0.3, SEED, block.SITE_ATTENTION)), N


def results(qkv: Tensor, H: int, dropout_p: float, **change: object) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) with names of the launcher changed."""
    before = {name: getattr(attention, name) for name in change}
    for name, value in change.items():
        setattr(attention, name, value)
    out, (lse,) = attention.forward(qkv, H, None, dropout_p, SEED, save=True)
    assert torch.equal(attention.forward(qkv, H, None, dropout_p, SEED, save=False)[0], out)
    for name, value in before.items():
        setattr(attention, name, value)
    return out, lse


def groups_and_shares() -> None:
    """The same numbers whichever heads a program takes; the same bits however many programs share them."""
    torch.manual_seed(0)
    for N, H, D, dropout_p in ((1, 8, 8, 0.0), (17, 12, 8, 0.2), (34, 4, 5, 0.2), (66, 2, 8, 0.0), (130, 2, 7, 0.0)):
        qkv = torch.randn(1, N, 3 * H * D)
        assert attention.heads_together(N, H, D, 4) > 1
        many = results(qkv, H, dropout_p)
        one = results(qkv, H, dropout_p, WARPS=0)
        assert all(map(torch.equal, many, one)), (N, H, D)
        single = results(qkv, H, dropout_p, heads_together=lambda *_: 1)
        assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-5) for pair in zip(many, single)), (N, H, D)


def held_keys() -> None:
    """K and V held over the query blocks give the bits that reading them again for each gives, and these are right."""
    torch.manual_seed(0)
    for N, H, D in ((97, 1, 16), (128, 1, 16), (129, 2, 8), (198, 1, 64), (256, 1, 24)):
        qkv, launched = torch.randn(1, N, 3 * H * D).half(), []

        def spy(*arguments: object, HELD: bool, **named: object) -> None:
            launched.append(HELD)
            common.launch(*arguments, HELD=HELD, **named)

        held = results(qkv, H, 0.0, WARPS=0, launch=spy)
        walked = results(qkv, H, 0.0, WARPS=0, launch=spy, holds=lambda *_: False)
        assert launched == [True, True, False, False], (N, launched)
        assert all(map(torch.equal, held, walked)), (N, H, D)
        truth = block.attention(qkv.double(), H, None, 0.0, None)
        assert torch.allclose(held[0].double(), truth, rtol=2e-3, atol=1e-3), (N, H, D)
    assert results(torch.randn(1, 257, 48).half(), 1, 0.0, WARPS=0, launch=spy) and launched[-1] is False


def backward_of_many_heads() -> None:
    """The gradients of one warp a head, which takes 16 queries at a time, are those of two: padded or not, dropout."""
    torch.manual_seed(0)
    before = attention.BACKWARD_WARPS
    for N, H, D, dropout_p in ((1, 2, 8, 0.0), (17, 1, 5, 0.2), (66, 2, 8, 0.2), (80, 1, 16, 0.0)):
        qkv, grad = torch.randn(1, N, 3 * H * D).half(), torch.randn(1, N, H * D).half()
        _, saved = attention.forward(qkv, H, None, dropout_p, SEED, save=True)
        found = []
        for attention.BACKWARD_WARPS in (before, 0, 0):
            found += attention.backward(grad, saved, [True], qkv, H, None, dropout_p, SEED)
        leaf = qkv.double().requires_grad_()
        block.attention(leaf, H, None, dropout_p, SEED).backward(grad.double())
        two, one, again = found
        assert torch.equal(one, again) and torch.allclose(one, two, rtol=1e-2, atol=2e-3), (N, H, D)
        assert torch.allclose(one.double(), leaf.grad, rtol=1e-2, atol=4e-3), (N, H, D)
    attention.BACKWARD_WARPS = before


if __name__ == "__main__":
    for check in (masks, groups_and_shares, held_keys, backward_of_many_heads):
        check()
        print(f"{check.__name__}: ok")
