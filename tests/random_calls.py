"""Random calls of the CPU ops for hypothesis: valid ones anywhere in an op's domain, and ways to spoil one argument.

A valid call reaches what the parity table leaves out: odd widths, no rows, left-out biases, mixed dtypes, tensors that
lie in memory in strange ways, gradients wanted by some arguments only, gradients that arrive with strides of zero,
more threads than rows, dropout next to 0 and to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

OPS = ("layernorm_linear", "attention", "linear_residual", "layernorm_mlp")
NO_GRADIENT = ("seed", "row_scale", "attn_row_scale", "mlp_row_scale")
MOST_MASK, MOST_WORK = 30_000, 8_000_000  # elements that Philox draws in PyTorch; multiplications of a forward pass


@dataclass(frozen=True)
class Call:
    """One call of an op: its keyword arguments, the arguments that get gradients, the output's gradient, threads."""

    op: str
    arguments: dict[str, Any]
    needs: tuple[str, ...]
    cotangent: str = "contiguous"
    threads: int = 1

    def tensors(self) -> list[str]:
        return [name for name, value in self.arguments.items() if isinstance(value, Tensor)]

    def with_argument(self, name: str, value: object) -> Call:
        return replace(self, arguments={**self.arguments, name: value})


# ---- How the values of a tensor lie in memory


def _wide_rows(x: Tensor) -> Tensor:
    """Rows far apart, NaN between them: a kernel that reads past a row shows."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 1003), math.nan)
    wide[..., :x.shape[-1]] = x
    return wide[..., :x.shape[-1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # equal values each
    "contiguous": lambda x: x,
    "offset": lambda x: torch.cat([x.new_full((3,), math.nan), x.flatten()])[3:].view(x.shape),
    "every second": lambda x: torch.stack([x, x.new_full(x.shape, math.nan)], dim=-1)[..., 0],
    "turned": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "wide rows": _wide_rows,
    "negative": lambda x: torch._neg_view(x.neg()),  # PyTorch's lazy minus, as in z.conj().imag
    "repeated": lambda x: x[:1].contiguous().expand(x.shape),  # the first row everywhere, a stride of 0
}
COTANGENTS = ("contiguous", "turned", "every second", "sum")


def cotangent_like(out: Tensor, kind: str) -> Tensor:
    """A gradient for the output `out`, the same numbers in all dtypes; "sum" is what `out.sum().backward()` sends."""
    if kind == "sum":
        return out.new_ones(()).expand(out.shape)
    normal = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return LAYOUTS[kind](normal.bfloat16().to(out.dtype))


# ---- Valid calls 

_PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
_RATES = st.one_of(st.floats(0.01, 0.9), st.sampled_from([1e-300, 1e-10, 2.0**-33, 0.5, 1 - 2.0**-20, 1 - 1e-12]))


def _width(most: int) -> st.SearchStrategy[int]:
    special = [n for n in (64, 127, 128, 129, 192, 257, 384, 768) if n <= most]
    return st.one_of(st.integers(1, 70), st.sampled_from(special))


def _parameter(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], *shape: int) -> Tensor:
    return (torch.randn(shape) * 0.2).to(draw(st.sampled_from(dtypes)))


@st.composite
def valid_calls(draw: st.DrawFn, ops: tuple[str, ...] = OPS) -> Call:
    """A valid call of an op."""
    op = draw(st.sampled_from(ops))
    torch.manual_seed(draw(st.integers(0, 1000)))
    activation, _ = pair = draw(st.sampled_from(_PAIRS))
    arguments = _attention(draw, activation) if op == "attention" else _rows_and_features(draw, op, *pair)
    return _called(draw, op, arguments)


@st.composite
def block_calls(draw: st.DrawFn) -> Call:
    """A valid call of encoder_block."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    activation, parameter = draw(st.sampled_from(_PAIRS))
    B, N, H, D, F = (draw(st.integers(low, high)) for low, high in ((0, 4), (1, 80), (1, 4), (1, 20), (1, 150)))
    C = H * D
    dtypes = (parameter,) if draw(st.booleans()) else (torch.float32, activation)
    shapes = {"ln1": (C,), "qkv": (3 * C, C), "proj": (C, C), "ln2": (C,), "fc1": (F, C), "fc2": (C, F)}
    parameters: dict[str, Any] = {}
    for name, shape in shapes.items():
        parameters[f"{name}_weight"] = _parameter(draw, dtypes, *shape)
        parameters[f"{name}_bias"] = _parameter(draw, dtypes, shape[0]) if draw(st.booleans()) else None
    settings = _dropout(draw, 0)
    if settings and draw(st.booleans()):
        settings["attn_dropout_p"] = draw(_RATES)
    for name in ("attn_row_scale", "mlp_row_scale"):
        if draw(st.booleans()):
            settings[name] = (torch.rand(B) * 2).to(draw(st.sampled_from([torch.float32, torch.float64])))
    if draw(st.booleans()):
        settings["eps"] = draw(st.sampled_from([1e-5, 1e-12, 1, 0.1]))
    x = torch.randn(B, N, C).to(activation)
    return _called(draw, "encoder_block", {"x": x, **parameters, "num_heads": H, **settings})


def _called(draw: st.DrawFn, op: str, arguments: dict[str, Any]) -> Call:
    """The call of these arguments, which now lie anyhow in memory, with gradients for some of them."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 0:
            how = draw(st.sampled_from(sorted(LAYOUTS)))
            if not (how == "repeated" and name == "x" and value.dim() == 1):  # a row of equal values: no LayerNorm
                arguments[name] = LAYOUTS[how](value)
    leaves = [name for name, value in arguments.items() if isinstance(value, Tensor) and name not in NO_GRADIENT]
    needs = leaves if draw(st.booleans()) else draw(st.lists(st.sampled_from(leaves), unique=True))
    return Call(op, arguments, tuple(needs), draw(st.sampled_from(COTANGENTS)), draw(st.sampled_from([1, 2, 3, 7, 64])))


def _dropout(draw: st.DrawFn, mask: int) -> dict[str, Any]:
    """dropout_p and seed, or neither, or a seed without dropout; `mask` elements would be drawn."""
    kind = draw(st.sampled_from(["none", "seeded", "rate 0"]))
    if kind == "none" or mask > MOST_MASK:
        return {}
    seed = torch.tensor(draw(st.integers(-2**63, 2**63 - 1)))
    return {"dropout_p": draw(_RATES) if kind == "seeded" else 0.0, "seed": seed}


def _attention(draw: st.DrawFn, activation: torch.dtype) -> dict[str, Any]:
    B, H, D = draw(st.integers(0, 4)), draw(st.integers(1, 5)), draw(_width(200))
    N = draw(st.one_of(st.integers(1, 90), st.sampled_from([128, 198, 257, 300])))
    if B * N * N * H * D > MOST_WORK:
        B = 1
    return {"qkv": torch.randn(B, N, 3 * H * D).to(activation), "num_heads": H,
            "scale": draw(st.sampled_from([None, None, 0.0, 1, -0.3, 2.5])), **_dropout(draw, B * H * N * N)}


def _rows_and_features(draw: st.DrawFn, op: str, activation: torch.dtype, parameter: torch.dtype) -> dict[str, Any]:
    C, F = draw(_width(768)), draw(_width(768))
    lead = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    if lead and draw(st.booleans()):
        lead = (*lead[:-1], draw(st.integers(90, 300)))
    rows = math.prod(lead)
    if rows * C * F > MOST_WORK:
        C, F = min(C, 65), min(F, 65)
    dtypes = (parameter,) if draw(st.booleans()) else (torch.float32, activation)  # one for all, or each its own

    def p(*shape: int) -> Tensor:
        return _parameter(draw, dtypes, *shape)

    def bias(*shape: int) -> Tensor | None:
        return p(*shape) if draw(st.booleans()) else None

    x = torch.randn(*lead, C).to(activation)
    eps = {} if draw(st.booleans()) else {"eps": draw(st.sampled_from([1e-5, 1e-12, 1, 0.1]))}
    branch: dict[str, Any] = {}
    if op != "layernorm_linear":
        branch = _dropout(draw, rows * max(C, F))
        if lead and draw(st.booleans()):
            branch["row_scale"] = (torch.rand(lead[0]) * 2).to(draw(st.sampled_from([torch.float32, torch.float64])))
    norm = {"ln_weight": p(C), "ln_bias": bias(C)}
    if op == "layernorm_linear":
        return {"x": x, **norm, "weight": p(F, C), "bias": bias(F), **eps}
    if op == "linear_residual":
        return {"x": x, "weight": p(F, C), "bias": bias(F), "residual": torch.randn(*lead, F).to(activation), **branch}
    return {"x": x, **norm, "fc1_weight": p(F, C), "fc1_bias": bias(F), "fc2_weight": p(C, F), "fc2_bias": bias(C),
            **eps, **branch}


# ---- Spoilt calls

# What no tensor argument may be, made of a good value v (a left-out bias is None and stays so).
_BAD_TENSORS: dict[str, Callable[[Tensor], object]] = {
    "longer": lambda v: torch.cat([v, v.narrow(-1, 0, 1)], dim=-1) if v.dim() else v[None],
    "deeper": lambda v: v[None, None, None, None],
    "flat and longer": lambda v: torch.cat([v.flatten(), v.new_zeros(1)]),
    "integer": lambda v: v.int(),
    "bool": lambda v: v.bool(),
    "complex": lambda v: torch.zeros(v.shape, dtype=torch.complex64),
    "half": lambda v: torch.zeros(v.shape, dtype=torch.float16),
    "meta": lambda v: v.to("meta"),
    "sparse": lambda v: torch.zeros(v.shape, dtype=v.dtype).to_sparse(),
    "list": lambda v: v.tolist(),
    "array": lambda v: np.zeros(tuple(v.shape)),
    "text": lambda v: "x",
}
_NOT_NUMBERS = ["0.1", [0.1], None, 1j, torch.zeros(2)]
_BAD_SETTINGS: dict[str, list] = {
    "dropout_p": [-0.1, -1e-300, 1.0, 1.5, math.nan, math.inf, *_NOT_NUMBERS],
    "eps": _NOT_NUMBERS,
    "scale": [value for value in _NOT_NUMBERS if value is not None],
    "num_heads": [0, -1, -2**63, 2**70, 2.5, math.nan, *_NOT_NUMBERS],
    "seed": [3, 0.5, "3", [1], torch.tensor(3, dtype=torch.int32), torch.tensor(3.0), torch.tensor([3]),
             torch.tensor(True), torch.tensor(3, device="meta")],
    "backend": ["tpu", "", 3, "cuda", ["cpu"]],
}
SETTINGS = {"layernorm_linear": ("eps", "backend"), "attention": ("num_heads", "scale", "dropout_p", "seed", "backend"),
            "linear_residual": ("dropout_p", "seed", "backend"),
            "layernorm_mlp": ("eps", "dropout_p", "seed", "backend"),
            "encoder_block": ("num_heads", "eps", "dropout_p", "attn_dropout_p", "seed", "backend")}
REQUIRED = ("x", "qkv", "ln_weight", "weight", "residual", "fc1_weight", "fc2_weight", "ln1_weight", "qkv_weight",
            "proj_weight", "ln2_weight")


@st.composite
def spoilt_calls(draw: st.DrawFn) -> tuple[Call, str]:
    """(a call with one argument that no backend may accept, what was done to it)."""
    call = draw(st.one_of(valid_calls(), block_calls()).filter(lambda call: all(call.arguments[n].numel() for n in call.tensors())))
    settings = SETTINGS[call.op]
    tensors = [name for name in call.tensors() if name != "seed"]
    name = draw(st.sampled_from([*tensors, *tensors, *settings]))
    if name in settings:
        value = draw(st.sampled_from(_BAD_SETTINGS[name.removeprefix("attn_")]))
        return call.with_argument(name, value), f"{name}={value!r}"
    kinds = [kind for kind in _BAD_TENSORS if not _fits(call, name, kind)]
    kind = draw(st.sampled_from([*kinds, "none"] if name in REQUIRED else kinds))
    value = None if kind == "none" else _BAD_TENSORS[kind](call.arguments[name])
    return call.with_argument(name, value), f"{name}: {kind}"


def _fits(call: Call, name: str, kind: str) -> bool:
    """Whether what `kind` makes of the argument is another valid call."""
    if name == "x" and kind == "deeper" and call.op not in ("linear_residual", "encoder_block"):
        return call.arguments.get("row_scale") is None or len(call.arguments["row_scale"]) == 1
    if name == "qkv" and kind == "longer":
        return (call.arguments["qkv"].shape[-1] + 1) % (3 * call.arguments["num_heads"]) == 0
    return name.endswith("row_scale") and kind == "half"
