"""The one table: every op, the inputs it is tried on, and the arguments that need gradients.

Parity (eager and compiled), opcheck, CUDA-graph replay and the op benchmarks all read CASES. A case makes the keyword
arguments of its op for a dtype; the oracle takes the same arguments to fp64. A new op is a row here, and a new row runs
everywhere.

Shapes are one row, an odd width, 2^k - 1, the presets' own (66 tokens of head_dim 8, 198 of head_dim 64), and adversarial ones: a
large mean, equal values, extreme logits, a transposed input, no rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from augment_plans import MEAN, STD, random_images, random_plan

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A column of the table: dtype of the activations, of the parameters, and whether autocast made them so."""

    name: str
    activation: torch.dtype
    parameter: torch.dtype
    autocast: bool = False


VARIANTS = (
    Variant("fp32", torch.float32, torch.float32),
    Variant("bf16", torch.bfloat16, torch.bfloat16),
    Variant("fp16", torch.float16, torch.float16),
    Variant("bf16mixed", torch.bfloat16, torch.float32),
    Variant("autocast", torch.float32, torch.float32, autocast=True),
)


class Maker:
    """Draws a case's tensors from its own seed, on the CPU in fp32, then rounds and moves them."""

    def __init__(self, seed: int, variant: Variant, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.variant, self.device = variant, device

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """Activations from N(offset, scale^2)."""
        return self._finish(torch.randn(shape, generator=self.generator) * scale + offset, self.variant.activation)

    def parameter(self, *shape: int, scale: float = 0.1, offset: float = 0.0) -> Tensor:
        """A parameter from N(offset, scale^2)."""
        return self._finish(torch.randn(shape, generator=self.generator) * scale + offset, self.variant.parameter)

    def drop_path(self, batch: int) -> Tensor:
        """A row_scale (B,): about a third zeros, the rest 1.5, in fp32."""
        return self._finish((torch.rand(batch, generator=self.generator) > 1 / 3) * 1.5, torch.float32)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def seed(self) -> Tensor:
        """A () int64 dropout seed that uses both words of the key."""
        return torch.tensor(0x1234567_89ABCDEF, device=self.device)

    def _finish(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(self.device)


@dataclass(frozen=True)
class Case:
    """One row: the op, a name for the shape, its inputs, and which of them need gradients.

    `compiled` marks the row that also runs under torch.compile; `slow_interpreted` rows are too large for Triton's
    interpreter.
    """

    op: str
    name: str
    make: Callable[[Maker], Inputs]
    grads: tuple[str, ...] = ()
    compiled: bool = False
    slow_interpreted: bool = False

    def inputs(self, variant: Variant, device: str = "cpu") -> Inputs:
        """The op's keyword arguments, the same for every backend."""
        return self.make(Maker(zlib.crc32(f"{self.op}-{self.name}".encode()), variant, device))

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def _layernorm(m: Maker, C: int) -> Inputs:
    return {"ln_weight": m.parameter(C, offset=1.0), "ln_bias": m.parameter(C)}


def _linear(m: Maker, C: int, F: int) -> Inputs:
    return {"weight": m.parameter(F, C, scale=C**-0.5), "bias": m.parameter(F)}


def _mlp(m: Maker, C: int, F: int) -> Inputs:
    return {"fc1_weight": m.parameter(F, C, scale=C**-0.5), "fc1_bias": m.parameter(F),
            "fc2_weight": m.parameter(C, F, scale=F**-0.5), "fc2_bias": m.parameter(C)}


def _with_equal_row(x: Tensor) -> Tensor:
    x.view(-1, x.shape[-1])[0] = 0.5
    return x


LN_LINEAR = ("x", "ln_weight", "ln_bias", "weight", "bias")
LAYERNORM_LINEAR = [
    Case("layernorm_linear", name, make, tuple(g for g in LN_LINEAR if g not in without), **flags)
    for name, make, without, flags in (
        ("1x1x64to1", lambda m: {"x": m.normal(1, 1, 64), **_layernorm(m, 64), **_linear(m, 64, 1)}, (), {}),
        ("3x17to5", lambda m: {"x": m.normal(3, 17), **_layernorm(m, 17), **_linear(m, 17, 5)}, (), {}),
        ("2x31x63to127", lambda m: {"x": m.normal(2, 31, 63), **_layernorm(m, 63), **_linear(m, 63, 127)}, (), {}),
        ("2x66x64to192", lambda m: {"x": m.normal(2, 66, 64), **_layernorm(m, 64), **_linear(m, 64, 192)}, (),
         {"compiled": True}),
        ("1x198x192to576", lambda m: {"x": m.normal(1, 198, 192), **_layernorm(m, 192), **_linear(m, 192, 576)}, (), {}),
        ("1x198x384to1152", lambda m: {"x": m.normal(1, 198, 384), **_layernorm(m, 384), **_linear(m, 384, 1152)}, (),
         {"slow_interpreted": True}),
        ("nobias", lambda m: {"x": m.normal(2, 9, 64), "ln_weight": m.parameter(64, offset=1.0), "ln_bias": None,
                              "weight": m.parameter(30, 64), "bias": None}, ("ln_bias", "bias"), {}),
        ("offset", lambda m: {"x": m.normal(5, 64, offset=300.0), **_layernorm(m, 64), **_linear(m, 64, 32)}, (), {}),
        ("equal", lambda m: {"x": _with_equal_row(m.normal(4, 64)), **_layernorm(m, 64), **_linear(m, 64, 32)}, (), {}),
        ("transposed", lambda m: {"x": m.normal(66, 2, 64).transpose(0, 1), **_layernorm(m, 64), **_linear(m, 64, 192)}, (),
         {}),
        ("empty", lambda m: {"x": m.normal(0, 66, 64), **_layernorm(m, 64), **_linear(m, 64, 192)}, (), {}),
    )
]

ATTENTION = [
    Case("attention", name, make, ("qkv",), **flags)
    for name, make, flags in (
        ("1x1x24h1", lambda m: {"qkv": m.normal(1, 1, 24), "num_heads": 1}, {}),
        ("3x7x45h3", lambda m: {"qkv": m.normal(3, 7, 45), "num_heads": 3}, {}),
        ("2x66x192h8", lambda m: {"qkv": m.normal(2, 66, 192), "num_heads": 8}, {"compiled": True}),
        ("2x65x192h8", lambda m: {"qkv": m.normal(2, 65, 192), "num_heads": 8}, {}),
        ("1x198x576h3", lambda m: {"qkv": m.normal(1, 198, 576), "num_heads": 3}, {}),
        ("1x300x96h2", lambda m: {"qkv": m.normal(1, 300, 96), "num_heads": 2}, {}),
        ("scale", lambda m: {"qkv": m.normal(2, 33, 96), "num_heads": 2, "scale": 0.5}, {}),
        ("dropout", lambda m: {"qkv": m.normal(2, 66, 192), "num_heads": 8, "dropout_p": 0.1, "seed": m.seed()}, {}),
        ("1x260x24h1p", lambda m: {"qkv": m.normal(1, 260, 24), "num_heads": 1, "dropout_p": 0.2, "seed": m.seed()}, {}),
        ("1x5x432h6", lambda m: {"qkv": m.normal(1, 5, 432), "num_heads": 6}, {}),
        ("1x17x576h12", lambda m: {"qkv": m.normal(1, 17, 576), "num_heads": 12}, {}),
        ("1x66x144h3", lambda m: {"qkv": m.normal(1, 66, 144), "num_heads": 3}, {}),
        ("1x66x120h2", lambda m: {"qkv": m.normal(1, 66, 120), "num_heads": 2}, {}),
        ("1x257x42h2", lambda m: {"qkv": m.normal(1, 257, 42), "num_heads": 2}, {}),
        ("extreme", lambda m: {"qkv": m.normal(1, 66, 192, scale=12.0), "num_heads": 8}, {}),
        ("transposed", lambda m: {"qkv": m.normal(66, 2, 192).transpose(0, 1), "num_heads": 8}, {}),
        ("empty", lambda m: {"qkv": m.normal(0, 66, 192), "num_heads": 8}, {}),
    )
]

LINEAR_RES = ("x", "weight", "bias", "residual")
LINEAR_RESIDUAL = [
    Case("linear_residual", name, make, tuple(g for g in LINEAR_RES if g not in without), **flags)
    for name, make, without, flags in (
        ("1x1x64", lambda m: {"x": m.normal(1, 1, 64), **_linear(m, 64, 64), "residual": m.normal(1, 1, 64)}, (), {}),
        ("3x17to5", lambda m: {"x": m.normal(3, 17), **_linear(m, 17, 5), "residual": m.normal(3, 5)}, (), {}),
        ("2x31x63to127", lambda m: {"x": m.normal(2, 31, 63), **_linear(m, 63, 127), "residual": m.normal(2, 31, 127)}, (), {}),
        ("2x66x64", lambda m: {"x": m.normal(2, 66, 64), **_linear(m, 64, 64), "residual": m.normal(2, 66, 64)}, (),
         {"compiled": True}),
        ("1x198x192", lambda m: {"x": m.normal(1, 198, 192), **_linear(m, 192, 192), "residual": m.normal(1, 198, 192)}, (),
         {}),
        ("dropout", lambda m: {"x": m.normal(2, 66, 64), **_linear(m, 64, 64), "residual": m.normal(2, 66, 64),
                               "dropout_p": 0.1, "seed": m.seed()}, (), {}),
        ("droppath", lambda m: {"x": m.normal(6, 11, 64), **_linear(m, 64, 64), "residual": m.normal(6, 11, 64),
                                "dropout_p": 0.25, "seed": m.seed(), "row_scale": m.drop_path(6)}, (), {}),
        ("wide", lambda m: {"x": m.normal(3, 7, 320), **_linear(m, 320, 48), "residual": m.normal(3, 7, 48), "dropout_p": 0.25,
                            "seed": m.seed(), "row_scale": m.drop_path(3)}, (), {}),
        ("nobias", lambda m: {"x": m.normal(2, 9, 64), "weight": m.parameter(30, 64), "bias": None,
                              "residual": m.normal(2, 9, 30)}, ("bias",), {}),
        ("transposed", lambda m: {"x": m.normal(66, 2, 64).transpose(0, 1), **_linear(m, 64, 64),
                                  "residual": m.normal(66, 2, 64).transpose(0, 1)}, (), {}),
        ("empty", lambda m: {"x": m.normal(0, 66, 64), **_linear(m, 64, 64), "residual": m.normal(0, 66, 64)}, (), {}),
    )
]

LN_MLP = ("x", "ln_weight", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
LAYERNORM_MLP = [
    Case("layernorm_mlp", name, make, tuple(g for g in LN_MLP if g not in without), **flags)
    for name, make, without, flags in (
        ("1x1x64", lambda m: {"x": m.normal(1, 1, 64), **_layernorm(m, 64), **_mlp(m, 64, 256)}, (), {}),
        ("3x17f5", lambda m: {"x": m.normal(3, 17), **_layernorm(m, 17), **_mlp(m, 17, 5)}, (), {}),
        ("2x31x63f127", lambda m: {"x": m.normal(2, 31, 63), **_layernorm(m, 63), **_mlp(m, 63, 127)}, (), {}),
        ("2x66x64", lambda m: {"x": m.normal(2, 66, 64), **_layernorm(m, 64), **_mlp(m, 64, 256)}, (), {"compiled": True}),
        ("1x198x192", lambda m: {"x": m.normal(1, 198, 192), **_layernorm(m, 192), **_mlp(m, 192, 768)}, (),
         {"slow_interpreted": True}),
        ("2x5x192f96", lambda m: {"x": m.normal(2, 5, 192), **_layernorm(m, 192), **_mlp(m, 192, 96)}, (), {}),
        ("dropout", lambda m: {"x": m.normal(2, 66, 64), **_layernorm(m, 64), **_mlp(m, 64, 256), "dropout_p": 0.1,
                               "seed": m.seed()}, (), {}),
        ("droppath", lambda m: {"x": m.normal(6, 11, 64), **_layernorm(m, 64), **_mlp(m, 64, 256), "dropout_p": 0.25,
                                "seed": m.seed(), "row_scale": m.drop_path(6)}, (), {}),
        ("nobias", lambda m: {"x": m.normal(2, 9, 64), "ln_weight": m.parameter(64, offset=1.0), "ln_bias": None,
                              "fc1_weight": m.parameter(96, 64), "fc1_bias": None, "fc2_weight": m.parameter(64, 96),
                              "fc2_bias": None}, ("ln_bias", "fc1_bias", "fc2_bias"), {}),
        ("wide", lambda m: {"x": m.normal(3, 7, 320), **_layernorm(m, 320), **_mlp(m, 320, 100), "dropout_p": 0.25,
                            "seed": m.seed(), "row_scale": m.drop_path(3)}, (), {}),
        ("offset", lambda m: {"x": m.normal(5, 64, offset=300.0), **_layernorm(m, 64), **_mlp(m, 64, 256)}, (), {}),
        ("equal", lambda m: {"x": _with_equal_row(m.normal(4, 64)), **_layernorm(m, 64), **_mlp(m, 64, 256)}, (), {}),
        ("transposed", lambda m: {"x": m.normal(66, 2, 64).transpose(0, 1), **_layernorm(m, 64), **_mlp(m, 64, 256)}, (), {}),
        ("empty", lambda m: {"x": m.normal(0, 66, 64), **_layernorm(m, 64), **_mlp(m, 64, 256)}, (), {}),
    )
]


def block_inputs(m: Maker, B: int, N: int, C: int, H: int, F: int, **settings: Any) -> Inputs:
    """A call of encoder_block: x (B, N, C), H heads, F hidden features."""
    def named(inputs: Inputs, prefix: str) -> Inputs:
        return {prefix + name.removeprefix("ln"): value for name, value in inputs.items()}

    return {"x": m.normal(B, N, C), **named(_layernorm(m, C), "ln1"), **named(_linear(m, C, 3 * C), "qkv_"),
            **named(_linear(m, C, C), "proj_"), **named(_layernorm(m, C), "ln2"), **_mlp(m, C, F), "num_heads": H,
            **settings}


def _without_biases(inputs: Inputs) -> Inputs:
    return {name: None if name.endswith("bias") else value for name, value in inputs.items()}


BLOCK = ("x", *(f"{name}_{kind}" for name in ("ln1", "qkv", "proj", "ln2", "fc1", "fc2") for kind in ("weight", "bias")))
ENCODER_BLOCK = [
    Case("encoder_block", name, make, tuple(g for g in BLOCK if g not in without), **flags)
    for name, make, without, flags in (
        ("1x1x8h1", lambda m: block_inputs(m, 1, 1, 8, 1, 8), (), {}),
        ("2x7x21h3", lambda m: block_inputs(m, 2, 7, 21, 3, 50), (), {}),
        ("2x66x64h8", lambda m: block_inputs(m, 2, 66, 64, 8, 256, dropout_p=0.1, attn_dropout_p=0.1, seed=m.seed()), (),
         {"compiled": True, "slow_interpreted": True}),
        ("2x18x48h6", lambda m: block_inputs(m, 2, 18, 48, 6, 40, dropout_p=0.2, attn_dropout_p=0.2, seed=m.seed()), (), {}),
        ("1x35x60h12", lambda m: block_inputs(m, 1, 35, 60, 12, 70), (), {}),
        ("1x17x64h4", lambda m: block_inputs(m, 1, 17, 64, 4, 96), (), {}),
        ("1x16x96h3", lambda m: block_inputs(m, 1, 16, 96, 3, 48), (), {}),
        ("droppath", lambda m: block_inputs(m, 6, 5, 16, 4, 24, dropout_p=0.25, seed=m.seed(), attn_row_scale=m.drop_path(6),
                                      mlp_row_scale=m.drop_path(6)), (), {}),
        ("nobias", lambda m: _without_biases(block_inputs(m, 2, 5, 16, 4, 24)),
         tuple(name for name in BLOCK if name.endswith("bias")), {}),
        ("1x198x192h3", lambda m: block_inputs(m, 1, 198, 192, 3, 768), (), {"slow_interpreted": True}),
        ("transposed", lambda m: {**block_inputs(m, 2, 9, 16, 2, 24), "x": m.normal(9, 2, 16).transpose(0, 1)}, (), {}),
        ("empty", lambda m: block_inputs(m, 0, 5, 16, 2, 24), (), {}),
    )
]


def _logits(m: Maker, B: int, K: int, scale: float = 3.0) -> Inputs:
    return {"cls_logits": m.normal(B, K, scale=scale), "dist_logits": m.normal(B, K, scale=scale),
            "teacher_logits": m.normal(B, K, scale=scale)}


def _mixed_target(m: Maker, B: int, K: int) -> Tensor:
    return torch.softmax(m.normal(B, K).float(), dim=-1)


def _without_class(inputs: Inputs, k: int) -> Inputs:
    """Class k of every logits tensor at -inf: switched off."""
    for name in ("cls_logits", "dist_logits", "teacher_logits"):
        inputs[name][:, k] = -torch.inf
    return inputs


DISTILLATION_LOSS = [
    Case("distillation_loss", name, make, grads, **flags)
    for name, make, grads, flags in (
        ("none64x10", lambda m: {"cls_logits": m.normal(64, 10), "dist_logits": None, "target": m.integers(10, 64)},
         ("cls_logits",), {}),
        ("smooth7x3", lambda m: {"cls_logits": m.normal(7, 3), "dist_logits": None, "target": m.integers(3, 7),
                                 "smoothing": 0.1}, ("cls_logits",), {}),
        ("soft64x10", lambda m: {**_logits(m, 64, 10), "target": m.integers(10, 64), "kind": "soft", "tau": 3.0},
         ("cls_logits", "dist_logits"), {"compiled": True}),
        ("numel5x1000", lambda m: {**_logits(m, 5, 1000), "target": _mixed_target(m, 5, 1000), "kind": "soft", "alpha": 0.1,
                                   "tau": 3.0, "reduction": "numel"}, ("cls_logits", "dist_logits"), {}),
        ("hard33x100", lambda m: {**_logits(m, 33, 100), "target": m.integers(100, 33), "kind": "hard", "smoothing": 0.1},
         ("cls_logits", "dist_logits"), {}),
        ("extreme4x10", lambda m: {**_logits(m, 4, 10, scale=200.0), "target": m.integers(10, 4), "kind": "soft"},
         ("cls_logits", "dist_logits"), {}),
        ("masked5x4", lambda m: {**_without_class(_logits(m, 5, 4), 3), "target": m.integers(3, 5), "kind": "hard"},
         ("cls_logits", "dist_logits"), {}),
        ("one1x1", lambda m: {**_logits(m, 1, 1), "target": m.integers(1, 1), "kind": "soft"},
         ("cls_logits", "dist_logits"), {}),
    )
]


def _augment(m: Maker, B: int, source: tuple[int, int], size: tuple[int, int], remode: str = "const", channels_last: bool = False,
             layout: str = "chw") -> Inputs:
    """Its values are tested to the last bit in test_augment.py; here it is compiled, opchecked and replayed like the rest."""
    plan = random_plan(B, B + 3, source, size, remode=remode, seed=B)
    return {"images": random_images(B + 3, *source, layout).to(m.device), "labels": (torch.arange(B + 3) % 10).to(m.device),
            "plan": plan.to(m.device), "mean": MEAN, "std": STD, "num_classes": 10, "size": size, "smoothing": 0.1,
            "dtype": m.variant.parameter, "channels_last": channels_last}


AUGMENT = [
    Case("augment", name, make, **flags)
    for name, make, flags in (
        ("1of1x1", lambda m: _augment(m, 1, (1, 1), (1, 1)), {}),
        ("7of33x17", lambda m: _augment(m, 7, (33, 17), (33, 17), channels_last=True), {}),
        ("64of32x32", lambda m: _augment(m, 64, (32, 32), (32, 32)),
         {"compiled": True, "slow_interpreted": True}),
        ("9of28x40to31x24", lambda m: _augment(m, 9, (28, 40), (31, 24), layout="hwc"), {}),
        ("2of224x224", lambda m: _augment(m, 2, (224, 224), (224, 224)), {"slow_interpreted": True}),
        ("empty", lambda m: _augment(m, 0, (32, 32), (32, 32)), {}),
    )
]

CASES = [*LAYERNORM_LINEAR, *ATTENTION, *LINEAR_RESIDUAL, *LAYERNORM_MLP, *ENCODER_BLOCK, *DISTILLATION_LOSS, *AUGMENT]
