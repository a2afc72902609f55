"""The encoder block as one call: bit for bit the four ops, and only where nobody chose otherwise for one of them."""

from __future__ import annotations

import re

import pytest
import torch

from cases import BLOCK, ENCODER_BLOCK, VARIANTS, Maker, block_inputs
from deit_fast import BackendError, create_model, ops, use_backend
from deit_fast.backend import OPS, record
from needs import needs_cpu
from test_parity import run

pytestmark = needs_cpu
CASES = {case.name: case for case in ENCODER_BLOCK}


def served(call) -> dict[str, str]:
    """The backend of every op that `call` reached."""
    with record() as found:
        call()
    return found


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in ("fp32", "bf16", "bf16mixed")],
                         ids=lambda variant: variant.name)
@pytest.mark.parametrize("name", ["2x7x21h3", "2x66x64h8", "droppath", "1x198x192h3"])
def test_the_four_ops_bit_for_bit(name: str, variant) -> None:
    case = CASES[name]
    inputs = case.inputs(variant)
    outputs, grads, cotangents = run(lambda **kw: ops.encoder_block(**kw, backend="cpu"), case, inputs)
    with use_backend("cpu", encoder_block="reference"):
        four, four_grads, _ = run(ops.encoder_block, case, inputs, cotangents)
    assert torch.equal(outputs[0], four[0])
    for gradient, block, composed in zip(case.grads, grads, four_grads, strict=True):
        assert torch.equal(block, composed), gradient


@pytest.mark.parametrize("wanted", [("fc2_bias",), ("ln2_weight", "proj_weight"), ("proj_bias",), ("qkv_weight",),
                                    ("x",), ("ln1_bias", "fc1_weight")])
def test_gradients_that_only_some_want(wanted: tuple[str, ...]) -> None:
    inputs = CASES["2x7x21h3"].inputs(VARIANTS[0])

    def gradients(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        out = ops.encoder_block(**{**inputs, **leaves}, backend="cpu")
        return dict(zip(leaves, torch.autograd.grad(out.square().sum(), list(leaves.values()))))

    every = gradients(BLOCK)
    for name, grad in gradients(wanted).items():
        assert torch.equal(grad, every[name]), name


def test_a_backend_named_for_one_op_is_used() -> None:
    small = CASES["2x7x21h3"].inputs(VARIANTS[0])
    four = {"layernorm_linear", "attention", "linear_residual", "layernorm_mlp"}
    assert served(lambda: ops.encoder_block(**small)) == dict.fromkeys({*four, "encoder_block"}, "cpu")
    with use_backend(attention="reference"):
        assert served(lambda: ops.encoder_block(**small)) == {**dict.fromkeys(four, "cpu"), "attention": "reference"}
    with use_backend("reference"):
        assert served(lambda: ops.encoder_block(**small)) == dict.fromkeys(four, "reference")
    assert served(lambda: ops.encoder_block(**small, backend="reference")) == dict.fromkeys(four, "reference")
    with use_backend("cpu", layernorm_mlp="reference"):
        assert served(lambda: ops.encoder_block(**small))["layernorm_mlp"] == "reference"


def test_a_backend_named_for_the_block_runs_or_raises() -> None:
    wide = CASES["1x198x192h3"].inputs(VARIANTS[0])  # automatically four ops
    x, blocks = stack(1)
    with use_backend(encoder_block="cpu"):
        assert served(lambda: ops.encoder_block(**wide))["encoder_block"] == "cpu"
    with use_backend(encoder="cpu"):
        assert served(lambda: ops.encoder(x, blocks, 3))["encoder"] == "cpu"
    with use_backend(encoder_block="cuda"), pytest.raises(BackendError, match="encoder_block: backend 'cuda' is not"):
        ops.encoder_block(**wide)
    with use_backend(encoder="cuda"), pytest.raises(BackendError, match="encoder: backend 'cuda' is not offered"):
        ops.encoder(x, blocks, 3)
    half = CASES["2x7x21h3"].inputs(VARIANTS[2])  # fp16 has no C++ kernel: the parts serve, and are what is recorded
    assert "encoder_block" not in served(lambda: ops.encoder_block(**half))


def test_each_op_has_its_own_order_where_the_block_has_none() -> None:
    """A wide block, and dropout that only PyTorch draws."""
    assert "encoder_block" not in served(lambda: ops.encoder_block(**CASES["1x198x192h3"].inputs(VARIANTS[0])))
    unseeded = {**CASES["2x66x64h8"].inputs(VARIANTS[0]), "seed": None}
    found = served(lambda: ops.encoder_block(**unseeded))
    assert "encoder_block" not in found and found["layernorm_linear"] == "cpu" and found["attention"] == "reference"


def test_the_model_calls_it() -> None:
    model = create_model("vit_nano_patch4_32", depth=1)
    assert served(lambda: model.eval()(torch.zeros(1, 3, 32, 32)))["encoder_block"] == "cpu"
    assert OPS["encoder_block"].parts == ("layernorm_linear", "attention", "linear_residual", "layernorm_mlp")


# ---- encoder: all blocks in one call


def stack(depth: int, dtype: torch.dtype = torch.float32, F: int = 40) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """(x (2, 7, 24), the parameters of `depth` blocks), a bias left out in every second block."""
    generator = torch.Generator().manual_seed(3)
    inputs = [block_inputs(Maker(index, VARIANTS[0], "cpu"), 2, 7, 24, 3, F + index) for index in range(depth)]
    blocks = [[None if name == "qkv_bias" and index % 2 else values[name].to(dtype) for name in BLOCK[1:]]
              for index, values in enumerate(inputs)]
    return torch.randn(2, 7, 24, generator=generator).to(dtype), blocks


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_its_blocks_bit_for_bit(depth: int, dtype: torch.dtype) -> None:
    x, blocks = stack(depth, dtype)
    before, expected = x.clone(), x
    for tensors in blocks:
        expected = ops.encoder_block(expected, *tensors, 3, backend="cpu")
    for stream in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        out = ops.encoder(stream, blocks, 3, backend="cpu")
        assert torch.equal(out, expected) and out.is_contiguous()
        assert out.data_ptr() != stream.data_ptr() and torch.equal(stream, before)


def test_an_encoder_with_gradients_goes_block_by_block() -> None:
    x, blocks = stack(2)
    assert served(lambda: ops.encoder(x, blocks, 3))["encoder"] == "cpu"
    blocks[1][10].requires_grad_()
    found = served(lambda: ops.encoder(x, blocks, 3))
    assert "encoder" not in found and found["encoder_block"] == "cpu"
    (grad,) = torch.autograd.grad(ops.encoder(x, blocks, 3).sum(), [blocks[1][10]])
    assert grad.abs().sum() > 0
    with torch.no_grad():
        assert served(lambda: ops.encoder(x, blocks, 3))["encoder"] == "cpu"


def test_an_encoder_takes_the_choices_made_for_its_parts() -> None:
    x, blocks = stack(1)
    for name in ("encoder", "encoder_block", "attention"):
        with use_backend(**{name: "reference"}):
            assert "encoder" not in served(lambda: ops.encoder(x, blocks, 3)), name
    assert "encoder" not in served(lambda: ops.encoder(x, blocks, 3, backend="reference"))
    with pytest.raises(BackendError, match="encoder_block: backend 'cuda' is not offered"):
        ops.encoder(x, blocks, 3, backend="cuda")


def test_an_encoder_under_autocast_and_compiled() -> None:
    x, blocks = stack(2)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(ops.encoder, fullgraph=True)(x, blocks, 3), ops.encoder(x, blocks, 3))
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.encoder(x, blocks, 3)
    assert torch.equal(out, ops.encoder(x.bfloat16(), blocks, 3))


def test_opcheck_of_the_encoder() -> None:
    x, blocks = stack(2)
    parameters = [tensor for tensors in blocks for tensor in tensors]
    torch.library.opcheck(torch.ops.deit_fast.encoder_forward.default, (x, parameters, 3, 1e-6, "cpu"))


@pytest.mark.parametrize(("spoil", "error", "text"), [
    (lambda blocks: blocks[1].pop(), ValueError, "encoder: block 1 must have 12 parameters, got 11."),
    (lambda blocks: blocks[1].__setitem__(2, torch.ones(5, 24)), ValueError,
     "encoder: block 1: qkv_weight must have shape (72, 24), got (5, 24)."),
    (lambda blocks: blocks[0].__setitem__(4, None), TypeError, "encoder: block 0: proj_weight must be a tensor"),
])
def test_blocks_that_do_not_fit(spoil, error: type[Exception], text: str) -> None:
    x, blocks = stack(2)
    spoil(blocks)
    with pytest.raises(error, match=re.escape(text)):
        ops.encoder(x, blocks, 3)


@pytest.mark.parametrize("change", [
    lambda blocks: blocks.train(), lambda blocks: setattr(blocks[1], "eps", 0.5),
    lambda blocks: setattr(blocks[0], "forward", lambda x, seed=None: x + 1)], ids=["training", "eps", "forward"])
def test_blocks_that_somebody_changed_are_called(change) -> None:
    """Inference with and without autograd's bookkeeping is the same."""
    model = create_model("vit_nano_patch4_32", depth=3, drop_rate=0.3).eval()
    change(model.blocks)
    images, seed = torch.randn(2, 3, 32, 32), torch.tensor(4)
    expected = model(images, seed).detach()
    with torch.no_grad():
        assert torch.equal(model(images, seed), expected)
        assert "encoder" not in served(lambda: model(images, seed))


def test_a_lazy_minus_and_no_blocks() -> None:
    x, blocks = stack(2)
    expected = ops.encoder(x, blocks, 3, backend="cpu")
    blocks[1][2] = torch._neg_view(blocks[1][2].neg())
    assert torch.equal(ops.encoder(x, blocks, 3, backend="cpu"), expected)
    for backend in ("cpu", "reference"):
        assert ops.encoder(x, [], 3, backend=backend).data_ptr() != x.data_ptr()


def test_hooks_between_blocks_fire() -> None:
    model, seen = create_model("vit_nano_patch4_32", depth=3).eval(), []
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert served(lambda: model(images))["encoder"] == "cpu"
        expected = model(images)
        handle = model.blocks[1].register_forward_hook(lambda _module, _args, out: seen.append(out))
        assert torch.equal(model(images), expected) and len(seen) == 1 and seen[0].shape == (2, 65, 64)
        handle.remove()
        assert served(lambda: model(images))["encoder"] == "cpu"
