"""How fast the native ops are, in ratios: `python benchmarks/compare.py --device cpu`.

Absolute times on a shared machine drift by half within minutes, so every figure is a ratio of candidates that take
turns in one process: each round gives all of them one turn, of several calls where a call is short, and the median
over rounds of (baseline's time / ours) is printed. Beside it stand rates, in percent of the peak that a loop on
registers alone reaches in the same run (`torch.mm` for scale).

The baselines are PyTorch's own: `reference` and timm's model (when it is installed), eager, under `torch.compile`, and
under bf16 autocast. In training they draw PyTorch's dropout, ours draws the seeded masks that every backend shares.
Inference also has ONNX Runtime and OpenVINO, when they are installed, and our frozen model, which like theirs keeps its
weights packed. Backward is counted as two products for each of forward's, whatever is computed again.

    --parts ops,train,infer,...     default: these three
            sweep                   the cost of an image at batch 16 to 1024
            memory                  peak memory of a training step, ours and reference's
            shapes                  the four ops at every preset's shape, cpu against reference
            presets                 training steps of the presets, automatic order against reference
            augment                 augmentation at 32 px against torchvision, kornia, timm and a copy, on one thread
    --no-compile                    leaves torch.compile out (it takes most of the five minutes)
    --threads 1                     counts CPU time, which other processes hardly disturb
"""

from __future__ import annotations

import argparse

import torch
from cpu import memory, presets, timing
from cpu.augment import compare_augment
from cpu.block_ops import compare_ops
from cpu.models import MODEL, candidates_for, frozen, inference, report, sweep, training
from cpu.peers import inference_engines

from deit_fast.backend import record
from deit_fast.kernels import cpu as kernels

BATCH = 64
PARTS = ("ops", "train", "infer", "sweep", "memory", "shapes", "presets", "augment")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--parts", default="ops,train,infer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}. Known: {', '.join(PARTS)}.")
    return args


def main() -> None:
    args = parse()
    if kernels.why_not():
        raise SystemExit(f"compare.py: {kernels.why_not()}")
    torch.set_num_threads(args.threads)
    if args.threads == 1:
        timing.count_cpu_time()
    torch.manual_seed(0)
    parts, compiled = args.parts.split(","), not args.no_compile
    print(f"torch {torch.__version__}, {args.threads} threads, CPU kernels for {kernels.isa}")
    if "ops" in parts:
        compare_ops(timing.peaks(args.threads), compiled)
    if "train" in parts:
        candidates = candidates_for(training(BATCH), compiled)
        with record() as served:
            candidates["ours bf16"]()
        report(f"training step of {MODEL}, batch {BATCH}", candidates, args.rounds, BATCH)
        print(f"  served by {served}")
    if "infer" in parts:
        for batch in (BATCH, 1):
            candidates = candidates_for(inference(batch), compiled)
            candidates |= frozen(batch) | inference_engines(batch, args.threads)
            report(f"inference of {MODEL}, batch {batch}", candidates, args.rounds, batch, calls=4 if batch > 1 else 40)
    if "sweep" in parts:
        sweep()
    if "memory" in parts:
        memory.compare_memory(BATCH, args.threads)
    if "shapes" in parts:
        presets.compare_shapes(args.rounds)
    if "presets" in parts:
        presets.compare_steps(args.rounds)
    if "augment" in parts:
        compare_augment(args.rounds)


if __name__ == "__main__":
    main()
