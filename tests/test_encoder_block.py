"""The encoder block as one call: bit for bit the four ops, and only where nobody chose otherwise for one of them."""

from __future__ import annotations

import pytest
import torch

from cases import BLOCK, ENCODER_BLOCK, VARIANTS
from deit_fast import create_model, ops, use_backend
from deit_fast.backend import OPS, record
from deit_fast.kernels import cpu
from test_parity import run

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
CASES = {case.name: case for case in ENCODER_BLOCK}


def served(call) -> dict[str, str]:
    """The backend of every op that `call` reached."""
    with record() as found:
        call()
    return found


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in ("fp32", "bf16", "bf16mixed")], ids=lambda v: v.name)
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


@pytest.mark.parametrize("wanted", [("fc2_bias",), ("ln2_weight", "proj_weight"), ("proj_bias",), ("qkv_weight",), ("x",),
                                    ("ln1_bias", "fc1_weight")])
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
