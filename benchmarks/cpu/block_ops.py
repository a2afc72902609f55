"""Single ops: rates beside the peak, and ratios to `reference`, eager and compiled.

Attention at a head_dim of 8 cannot reach the peak of the products: between its two products it takes an exponential of
every logit, and with dropout a Philox word. Its rate stands beside an instruction roofline instead: every vector
instruction that the arithmetic needs is counted, and issued at the rate at which FMAs were measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from deit_fast import ops
from deit_fast.backend import OPS
from deit_fast.kernels import cpu

from .timing import Candidates, Times, now, ratio

BATCH, TOKENS, C, HEADS, HIDDEN, DROP = 64, 66, 64, 8, 256, 0.1

# Instructions for a vector of logits beside the products. Softmax: one FMA into the exponent, 2^x, the running maximum
# and the sum (csrc/cpu/attention_math.h). Philox draws 4 vectors of words in 10 rounds of at least 4 multiplications, 4
# xors and 2 permutations; then come a comparison, a selection and the scale. Backward multiplies P into dP - rowsum,
# and sums that.
SOFTMAX = 3 + (7 if cpu.isa and "avx512" in cpu.isa or cpu.isa == "amx" else 13)
PHILOX, GRADIENT = 10 * 10 / 4 + 3, 4


def attention_share(head_dim: int, dropout: bool, backward: bool) -> float:
    """The share of the peak that attention's counted products can reach: their FMAs over all instructions.

    Forward is two products; backward counts as four and does five, since it computes the logits again.
    """
    done, counted = (5, 4) if backward else (2, 2)
    other = SOFTMAX + (PHILOX if dropout else 0) + (GRADIENT if backward else 0)
    return counted * head_dim / (done * head_dim + other)


def op_calls(dtype: torch.dtype) -> tuple[dict[str, tuple[Callable[[str], Tensor], int]], list[Tensor]]:
    """For each op, (its call with a backend's name, FLOP of forward), at the nano preset's shape and dropout; then the
    tensors that get gradients."""
    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype).requires_grad_()

    rows, seed = BATCH * TOKENS, torch.tensor(11)
    x, y, qkv = tensor(BATCH, TOKENS, C), tensor(BATCH, TOKENS, C), tensor(BATCH, TOKENS, 3 * C)
    norm = (tensor(C), tensor(C))
    w_qkv, w_proj = (tensor(3 * C, C, scale=0.1), tensor(3 * C)), (tensor(C, C, scale=0.1), tensor(C))
    mlp = (tensor(HIDDEN, C, scale=0.1), tensor(HIDDEN), tensor(C, HIDDEN, scale=0.1), tensor(C))

    def dropout(backend: str) -> tuple[float, Tensor | None]:
        return DROP, None if backend == "reference" else seed

    calls = {
        "layernorm_linear": (lambda be: ops.layernorm_linear(x, *norm, *w_qkv, backend=be), 2 * rows * C * 3 * C),
        "attention": (lambda be: ops.attention(qkv, HEADS, backend=be), 4 * rows * TOKENS * C),
        "attention dropped": (lambda be: ops.attention(qkv, HEADS, None, *dropout(be), backend=be),
                              4 * rows * TOKENS * C),
        "linear_residual": (lambda be: ops.linear_residual(y, *w_proj, x, *dropout(be), backend=be), 2 * rows * C * C),
        "layernorm_mlp": (lambda be: ops.layernorm_mlp(x, *norm, *mlp, 1e-6, *dropout(be), backend=be),
                          4 * rows * C * HIDDEN),
    }
    return calls, [x, y, qkv, *norm, *w_qkv, *w_proj, *mlp]


def split_times(calls: dict[str, Callable[[], Tensor]], leaves: list[Tensor], rounds: int) -> tuple[Times, Times]:
    """(forward, backward) seconds of each candidate in each round, after two rounds to warm up.

    A turn is three times forward and backward, of which the last counts: the first ones find the others' tensors in the
    caches. Backward hands its gradients over; it does not add them to those of the turn before.
    """
    times = ({name: [] for name in calls}, {name: [] for name in calls})
    for index in range(rounds + 2):
        for name, call in calls.items():
            for _ in range(3):
                for leaf in leaves:
                    leaf.grad = None
                start = now()
                out = call()
                middle = now()
                grad = torch.ones_like(out)
                begun = now()
                out.backward(grad)
                end = now()
            if index >= 2:
                times[0][name].append(middle - start)
                times[1][name].append(end - begun)
    return times


def compare_ops(peak: dict[torch.dtype, float], compiled: bool) -> None:
    """Prints, for each op and dtype, its rate beside the peak and how many times faster it is than `reference`."""
    print(f"\nops at ({BATCH}, {TOKENS}, {C}), dropout {DROP}: GFLOP/s (% of peak, that of the fastest turn), "
          f"times faster than reference eager{' / compiled' if compiled else ''}; attention also in % of its "
          "instruction roofline")
    for dtype in (torch.float32, torch.bfloat16):
        calls, leaves = op_calls(dtype)
        for name, (call, flops) in calls.items():
            candidates: Candidates = {"reference": lambda call=call: call("reference")}
            if OPS[name.split()[0]].why_not_here("cpu") is None:
                candidates["ours"] = lambda call=call: call("cpu")
            if compiled:
                candidates["compiled"] = torch.compile(lambda call=call: call("reference"), dynamic=False)
            both, texts = split_times(candidates, leaves, 20), []
            for backward, times, work in ((False, both[0], flops), (True, both[1], 2 * flops)):
                ours = "ours" if "ours" in candidates else "reference"
                rate, best = work / statistics.median(times[ours]), work / min(times[ours])
                shares = f"{100 * rate / peak[dtype]:3.0f} %, {100 * best / peak[dtype]:3.0f} %"
                if name.startswith("attention"):  # whose arithmetic is fp32 in both dtypes
                    roof = peak[torch.float32] * attention_share(C // HEADS, "dropped" in name, backward)
                    shares += f"; of its roofline {100 * rate / roof:3.0f} %, {100 * best / roof:3.0f} %"
                ratios = " / ".join(f"{ratio(times, other, ours):.2f}" for other in candidates if other != ours)
                texts.append(f"{'backward' if backward else 'forward'} {rate / 1e9:6.0f} ({shares}) x {ratios or '-'}")
            note = "" if "ours" in candidates else "   (reference)"
            print(f"  {str(dtype)[6:]:9s}{name:18s}{'   '.join(texts)}{note}", flush=True)
            torch._dynamo.reset()
