"""Checks that run in Triton's interpreter, in the process that test_triton_interpreted.py starts.

Dropout masks are made visible by inputs for which the output is the mask: equal logits and V = identity, weights of
zero.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import torch

import deit_fast
from cases import CASES, VARIANTS, Maker, block_inputs
from deit_fast import backend, ops
from deit_fast.backend import OPS, BackendError
from deit_fast.kernels.encoder_block import Arguments
from deit_fast.kernels.triton import attention, common, encoder_block, layernorm_mlp, linear, rowwise
from deit_fast.kernels.triton.attention import split_keys
from deit_fast.reference import block
from deit_fast.reference.philox import keep_mask
from test_parity import run, test_opcheck
from too_large import TooLarge

SEEDS = (0, 1, -1, 0x1234567_89ABCDEF)

# A row of the parity table for each op, a quick one with gradients of everything that it is given.
SMALL = {"layernorm_linear": "3x17to5", "attention": "3x7x45h3", "linear_residual": "3x17to5",
         "layernorm_mlp": "3x17f5", "encoder_block": "nobias", "distillation_loss": "extreme4x10", "augment": "1of1x1"}


def attention_masks() -> None:
    """With q = k = 0 and V = identity, out N (1 - p) is the mask: aligned (N = 16) and unaligned (N = 18) rows."""
    for seed in map(torch.tensor, SEEDS):
        for N, H in ((16, 2), (18, 1)):
            qkv = torch.zeros(2, N, 3, H, 32)
            qkv[:, :, 2] = torch.eye(N, 32)[None, :, None]
            out = ops.attention(qkv.view(2, N, -1), H, dropout_p=0.3, seed=seed, backend="triton")
            mask = out.view(2, N, H, 32).transpose(1, 2)[..., :N] > 0.5 / N  # (B, H, N, N)
            assert torch.equal(mask, keep_mask((2, H, N, N), 0.3, seed, block.SITE_ATTENTION)), (N, seed)


def linear_residual_masks() -> None:
    """With a weight of 0 and a bias of 1, out is the mask; also p > 1 / 2, whose threshold does not fit in int32."""
    for seed in map(torch.tensor, SEEDS):
        for F, p in ((64, 0.1), (33, 0.1), (36, 0.7)):
            out = ops.linear_residual(torch.zeros(2, 5, 8), torch.zeros(F, 8), torch.ones(F), torch.zeros(2, 5, F), p,
                                      seed, backend="triton")
            assert torch.equal(out != 0, keep_mask((2, 5, F), p, seed, block.SITE_LINEAR_RESIDUAL)), (F, p, seed)


def mlp_masks() -> None:
    """With fc1 = 0, b1 = 9 and fc2 = identity, out is both masks' product; fused (C = 32) and wide (C = 68)."""
    for seed in map(torch.tensor, SEEDS[-2:]):
        for C in (32, 68):
            x = torch.zeros(2, 5, C)
            out = ops.layernorm_mlp(x, torch.ones(C), torch.zeros(C), torch.zeros(C, C), torch.full((C,), 9.0),
                                    torch.eye(C), None, dropout_p=0.4, seed=seed, backend="triton")
            hidden = keep_mask(x.shape, 0.4, seed, block.SITE_MLP_HIDDEN)
            output = keep_mask(x.shape, 0.4, seed, block.SITE_MLP_OUTPUT)
            assert torch.equal(out != 0, hidden & output), (C, seed)


def block_call(seed: int, N: int, C: int, H: int, F: int) -> Arguments:
    """A call of encoder_block on two images with everything: three dropouts, drop-path, biases."""
    m = Maker(seed, VARIANTS[0], "cpu")
    scales = {"attn_row_scale": torch.tensor([1.5, 0.5]), "mlp_row_scale": torch.tensor([0.5, 1.5])}
    return Arguments(**block_inputs(m, 2, N, C, H, F, eps=1e-5, dropout_p=0.3, attn_dropout_p=0.2,
                                    seed=torch.tensor(seed), **scales))


def block_saves_what_the_four_save() -> None:
    """The one kernel's output, qkv, y, h and log-sum-exp are those of the four, masks included; aligned rows or not."""
    for seed in SEEDS[-2:]:
        for shape in ((16, 16, 4, 24), (18, 18, 3, 21), (34, 10, 10, 70)):
            call = block_call(seed, *shape)
            ours, theirs = (who.forward(*call, save=True) for who in (encoder_block, encoder_block.chain))
            for i, (one, four) in enumerate(zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True)):
                assert torch.allclose(one, four, rtol=1e-5, atol=1e-5), (seed, shape, i)


def block_shares() -> None:
    """However many programs share an image, and whether anything is saved: the same bits."""
    call, most = block_call(3, 37, 16, 4, 24), encoder_block.PROGRAMS
    out, saved = encoder_block.forward(*call, save=True)
    assert torch.equal(encoder_block.forward(*call, save=False)[0], out)
    for encoder_block.PROGRAMS, per_image in ((2, 1), (4, 2)):
        assert encoder_block.shares(2, 3) == per_image
        again, kept = encoder_block.forward(*call, save=True)
        assert all(torch.equal(one, two) for one, two in zip([out, *saved], [again, *kept], strict=True)), per_image
    encoder_block.PROGRAMS = most


def block_backward_is_the_fours() -> None:
    """Its gradients are those of the four ops: masks, drop-path, absent biases, one or several row tiles a program."""
    most, recorded = encoder_block.PROGRAMS, []
    original = encoder_block.launch
    encoder_block.launch = lambda op, kernel, *rest, **named: (recorded.append(kernel.__name__),
                                                                original(op, kernel, *rest, **named))
    no_biases = {name: None for name in Arguments._fields if name.endswith("_bias")}
    for absent, encoder_block.PROGRAMS in ((no_biases, most), ({}, 1)):
        call = block_call(3, 18, 12, 3, 21)._replace(**absent)
        out, saved = encoder_block.forward(*call, save=True)
        grad, needs = torch.randn(out.shape), [each is not None for each in call[:13]]
        recorded.clear()
        ours = encoder_block.backward(grad, saved, needs, *call)
        assert recorded == ["encoder_block_bwd_mlp_kernel", "encoder_block_bwd_qkv_kernel"], recorded
        theirs = encoder_block.chain.backward(grad, saved, needs, *call)
        for name, one, four in zip(Arguments._fields, ours, theirs, strict=False):
            assert one.shape == four.shape and torch.allclose(one, four, rtol=1e-4, atol=2e-5), name
    recorded.clear()
    frozen = [name != "fc1_bias" for name in Arguments._fields[:13]]
    grads = encoder_block.backward(grad, saved, frozen, *call)
    assert not recorded and [g.numel() > 0 for g in grads] == frozen
    encoder_block.PROGRAMS, encoder_block.launch = most, original


def gradients_repeat() -> None:
    """Two backward passes give the same bits."""
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 50, 24), torch.randn(40, 24), torch.randn(40)
    leaves = [t.requires_grad_() for t in (x, torch.ones(24), torch.zeros(24), w, b)]
    runs = [torch.autograd.grad(ops.layernorm_linear(*leaves, backend="triton").square().sum(),
                                leaves) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def frozen_parameters() -> None:
    """A frozen argument gets no gradient and changes nobody else's."""
    torch.manual_seed(0)
    shapes = {"x": (2, 9, 16), "ln_weight": (16,), "ln_bias": (16,), "fc1_weight": (20, 16), "fc1_bias": (20,),
              "fc2_weight": (16, 20), "fc2_bias": (16,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    full = None
    for trained in (tuple(shapes), ("x",), ("fc1_weight",), ("fc2_bias",)):
        inputs = {name: t.clone().requires_grad_(name in trained) for name, t in tensors.items()}
        ops.layernorm_mlp(**inputs, backend="triton").square().sum().backward()
        full = full or inputs
        for name, t in inputs.items():
            assert (t.grad is not None) == (name in trained), (trained, name)
            assert t.grad is None or torch.equal(t.grad, full[name].grad), (trained, name)


def many_tiles_per_program() -> None:
    """Gradients stay right where a program takes several row tiles, as it does past 8,000 rows."""
    torch.manual_seed(0)
    linear.PROGRAMS = layernorm_mlp.PROGRAMS = rowwise.GRADIENT_PROGRAMS = 2
    for C in (16, 260):
        shapes = {"x": (200, C), "ln_weight": (C,), "ln_bias": (C,), "fc1_weight": (24, C), "fc1_bias": (24,),
                  "fc2_weight": (C, 24), "fc2_bias": (C,)}
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes.values()]
        for op, count in (("layernorm_mlp", 7), ("layernorm_linear", 5)):
            outs = [getattr(ops, op)(*leaves[:count], backend=backend) for backend in ("triton", "reference")]
            ours, theirs = (torch.autograd.grad(out.square().sum(), leaves[:count]) for out in outs)
            for name, mine, plain in zip(shapes, ours, theirs):
                assert torch.allclose(mine, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item()), (op, C, name)


def refusals() -> None:
    """why_not speaks for dtypes, dropout without a seed, a kernel that did not compile; `select` steps down."""
    qkv = torch.randn(1, 4, 24)
    op = OPS["attention"]
    assert op.why_not("triton", qkv, 2, None, 0.0, None) is None
    assert "interpreter" in op.why_not("triton", qkv.bfloat16(), 2, None, 0.0, None)
    assert "float64" in op.why_not("triton", qkv.double(), 2, None, 0.0, None)
    assert "without a seed" in op.why_not("triton", qkv, 2, None, 0.1, None)
    common.FAILED["attention"] = "Triton 0.0 could not compile a_kernel here: out of resource"
    assert op.select(None, qkv, 2, None, 0.0, None) != "triton"
    try:
        ops.attention(qkv, 2, backend="triton")
    except BackendError as error:
        assert "out of resource" in str(error)
    else:
        raise AssertionError("a backend that was asked for by name must raise")
    common.FAILED.clear()


def stepping_down() -> None:
    """In the automatic order, reference serves the very call whose kernel does not fit: forward, then backward only."""
    qkv, seed = torch.randn(2, 9, 24), torch.tensor(5)
    backend.BY_NAME_ONLY = ()
    op, order = OPS["attention"], OPS["attention"].order
    object.__setattr__(op, "order", lambda *_: ("triton",))
    expected = None
    for name in ("attention_fwd_kernel", "attention_bwd_kernel"):
        for requested in (None, "triton"):
            kernel, lines = getattr(attention, name), io.StringIO()
            setattr(attention, name, TooLarge())
            leaf = qkv.clone().requires_grad_()
            try:
                with redirect_stderr(lines):
                    out = ops.attention(leaf, 2, dropout_p=0.2, seed=seed, backend=requested)
                    out.square().sum().backward()
                assert requested is None, "asked for by name, it must raise"
                expected = expected or (out, leaf.grad)
                assert torch.allclose(out, expected[0], atol=1e-6) and torch.allclose(leaf.grad, expected[1], atol=1e-5)
                assert "out of resource: shared memory" in lines.getvalue() and lines.getvalue().count("\n") == 1
                assert "too_large_kernel" in op.why_not("triton", qkv, 2, None, 0.0, None)
            except BackendError as error:
                assert requested == "triton" and "out of resource" in str(error), error
            setattr(attention, name, kernel)
            common.FAILED.clear()
    object.__setattr__(op, "order", order)


def compiled_ops() -> None:
    """opcheck of every registered operator; under torch.compile without a graph break, the bits of the eager call."""
    small = [case for case in CASES if SMALL[case.op] == case.name]
    assert {case.op for case in small} == {name for name, op in OPS.items() if "triton" in op.offers}
    for case in small:
        if case.op != "encoder_block":  # 5 s for its 20 arguments; it is registered as the others are
            test_opcheck(case, VARIANTS[0], "triton")
        inputs, op = case.inputs(VARIANTS[0]), getattr(ops, case.op)
        call = torch.compile(op, fullgraph=True, backend="aot_eager")
        (outs, grads, cotangents), (ours, mine, _) = (
            run(lambda **kw: function(**kw, backend="triton"), case, inputs) for function in (op, call))
        for one, two in zip([*outs, *grads], [*ours, *mine], strict=True):
            assert torch.equal(one, two), case.id


def compiled_model() -> None:
    """A whole model in training mode compiles without a graph break and computes what it does uncompiled."""
    torch.manual_seed(0)
    model = deit_fast.create_model("deit_nano_distilled_patch4_32", 10, img_size=8, embed_dim=16, num_heads=2, depth=1,
                                   drop_rate=0.1, attn_drop_rate=0.1).train()
    model.pos_drop.p = 0.0  # the one dropout that no seed governs
    images, seed, results = torch.randn(2, 3, 8, 8), torch.tensor(5), []
    with deit_fast.use_backend("triton"):
        for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            outs = forward(images, seed)
            grads = torch.autograd.grad(sum(out.square().sum() for out in outs), list(model.parameters()))
            results.append([*outs, *grads])
    for eager, ours in zip(*results, strict=True):
        assert torch.allclose(eager, ours, rtol=1e-5, atol=1e-6)


def compiled_stepping_down() -> None:
    """A kernel that does not fit ends the compiled call that meets it; the next call is compiled anew, for another."""
    qkv, kernel = torch.randn(2, 9, 24), attention.attention_fwd_kernel
    backend.BY_NAME_ONLY = ()
    op, order = OPS["attention"], OPS["attention"].order
    object.__setattr__(op, "order", lambda *_: ("triton",))
    attention.attention_fwd_kernel = TooLarge()
    call = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    try:
        call(qkv, 2)
    except BackendError as error:
        assert "too_large_kernel" in str(error)
    else:
        raise AssertionError("the kernel does not fit")
    assert torch.allclose(call(qkv, 2), ops.attention(qkv, 2, backend="reference"))
    attention.attention_fwd_kernel = kernel
    common.FAILED.clear()
    object.__setattr__(op, "order", order)


def key_splits() -> None:
    """Keys are cut into full blocks and one tail, without loss."""
    for N in range(1, 400):
        for BLOCK_N in (16, 32, 64):
            full, tail = split_keys(N, BLOCK_N)
            assert full % BLOCK_N == 0 and full <= N <= full + tail and tail <= BLOCK_N and (tail == 0) == (N == full)
    assert split_keys(66, 64) == (64, 16) and split_keys(198, 64) == (192, 16)


if __name__ == "__main__":
    for check in (attention_masks, linear_residual_masks, mlp_masks, block_saves_what_the_four_save, block_shares,
                  block_backward_is_the_fours, gradients_repeat, frozen_parameters, many_tiles_per_program, refusals,
                  stepping_down, compiled_ops, compiled_model, compiled_stepping_down, key_splits):
        check()
        print(f"{check.__name__}: ok")
