"""Compiles every Triton kernel that the presets' shapes select, without a GPU, and prints what the chip gets.

    python scripts/cubins.py [--arch 80 90 100] [--op attention ...] [--dtype bf16 ...] [--preset NAME ...]

The launchers run on `meta` tensors while `common.recording()` collects their launches, so kernels, constants and
specialisations are those of a real run. Columns: registers per thread, stack bytes (spills), dynamic shared memory per
program in bytes, SASS instructions.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from deit_fast import ops  # noqa: E402
from deit_fast.data.plan import neutral_plan  # noqa: E402
from deit_fast.kernels.triton import augment  # noqa: E402
from deit_fast.kernels.triton.common import Launch, recording  # noqa: E402
from deit_fast.models.presets import PRESETS  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per program, CUDA programming guide
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
            torch.int32: "*i32", torch.uint8: "*u8"}
DTYPES = {"fp32": (torch.float32, torch.float32), "fp16": (torch.float16, torch.float16),
          "bf16": (torch.bfloat16, torch.bfloat16), "bf16mixed": (torch.bfloat16, torch.float32)}
AUGMENT_OPTIONS = ({}, {"remode": "const", "channels_last": True}, {"remode": "rand", "padding_mode": "reflect"},
                   {"resizes": True})
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: registers and stack bytes per thread, shared bytes, and its SASS instructions."""

    registers: int
    stack: int
    shared: int
    instructions: int


def block_calls(preset: str, dtype: str, batch: int = 64) -> dict[str, tuple]:
    """op -> the arguments of its call in a training step of the preset, as meta tensors."""
    settings = PRESETS[preset]
    x_dtype, w_dtype = DTYPES[dtype]
    C, H, K = settings["embed_dim"], settings["num_heads"], settings["num_classes"]
    prefix = 1 if settings.get("tokens", "cls") == "cls" else 2
    N = prefix + (settings["img_size"] // settings["patch_size"]) ** 2
    p = settings.get("drop_rate", 0.0)
    seed = _meta(torch.int64) if p else None

    def x(*shape: int) -> Tensor:
        return _meta(x_dtype, *shape)

    def w(*shape: int) -> Tensor:
        return _meta(w_dtype, *shape)

    return {
        "layernorm_linear": (x(batch, N, C), w(C), w(C), w(3 * C, C), w(3 * C), 1e-6),
        "attention": (x(batch, N, 3 * C), H, None, 0.0, None),
        "linear_residual": (x(batch, N, C), w(C, C), w(C), x(batch, N, C), p, seed, None),
        "layernorm_mlp": (x(batch, N, C), w(C), w(C), w(4 * C, C), w(4 * C), w(C, 4 * C), w(C), 1e-6, p, seed, None),
        "encoder_block": (x(batch, N, C), w(C), w(C), w(3 * C, C), w(3 * C), w(C, C), w(C), w(C), w(C), w(4 * C, C),
                          w(4 * C), w(C, 4 * C), w(C), H, 1e-6, p, 0.0, seed, None, None),
        "distillation_loss": (x(batch, K), x(batch, K), _meta(torch.int64, batch), x(batch, K), "soft", 0.5, 3.0,
                              "batchmean", 0.0),
    }


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(op: str, call: tuple, needs: list[bool] | None = None) -> list[Launch]:
    """The launches of one forward and one backward of an op, for the gradients in `needs` (all, if None)."""
    native, module = native_op(op), importlib.import_module(f"deit_fast.kernels.triton.{op}")
    needs = [call[i] is not None for i in native.grads] if needs is None else needs
    with recording() as found:
        out, saved = module.forward(*call, save=True)
        call = tuple(None if i == native.added else argument for i, argument in enumerate(call))
        module.backward(out.new_empty(out.shape), saved, needs, *call)
    return found


def augment_launches(side: int, dtype: torch.dtype, resizes: bool = False, remode: str = "pixel",
                     padding_mode: str = "constant", channels_last: bool = False, batch: int = 64) -> list[Launch]:
    """The launches of one `augment` of square images; with `resizes` they are resized and their hue turns."""
    plan = neutral_plan(_meta(torch.int64, batch))
    if resizes:
        plan = replace(plan, resized_crop=_meta(torch.int32, batch, 4), jitter_order=_meta(torch.uint8, batch, 4),
                       jitter=_meta(torch.int32, batch, 4))
    out = _meta(dtype, *((batch, side, side, 3) if channels_last else (batch, 3, side, side)))
    out = out.permute(0, 3, 1, 2) if channels_last else out
    with recording() as found:
        augment.forward(_meta(torch.uint8, batch, 3, side, side), _meta(torch.int64, batch),
                        list(plan.tensors().values()), remode, padding_mode, [0.5] * 3, [0.25] * 3, 10, side, side, 0.1,
                        dtype, channels_last, out=out, targets=_meta(torch.float32, batch, 10))
    return found


def native_op(op: str) -> ModuleType:
    """The op's NativeOp."""
    return sys.modules[getattr(ops, op).__module__].NATIVE


def matrix(presets: list[str], names: list[str], dtypes: list[str]) -> Iterator[tuple[str, str, Launch]]:
    """(preset, dtype, launch) of every distinct kernel that the presets' training steps launch."""
    seen = set()
    for preset in presets:
        for dtype in dtypes:
            found = [launch for op, call in block_calls(preset, dtype).items() if op in names
                     for launch in launches_of(op, call)]
            if "augment" in names:
                for options in AUGMENT_OPTIONS:
                    found += augment_launches(PRESETS[preset]["img_size"], DTYPES[dtype][0], **options)
            for launch in found:
                if specialisation(launch) not in seen:
                    seen.add(specialisation(launch))
                    yield preset, dtype, launch


def specialisation(launch: Launch) -> tuple:
    """Equal for launches that share one compiled kernel."""
    return launch.kernel.__name__, tuple(sorted((name, _kind(launch, name, value)) for name,
                                                value in launch.arguments.items()))


def _kind(launch: Launch, name: str, value: object) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if value is None or name in OPTIONS or launch.kernel.params[launch.kernel.arg_names.index(name)].is_constexpr:
        return f"={value}"
    return "fp32" if isinstance(value, float) else "i32" if -2**31 <= value < 2**31 else "i64"


def compile_launch(launch: Launch, arch: int) -> Usage:
    """What the kernel of a launch needs on sm_<arch>."""
    compiled = compiled_kernel(launch, arch)
    return _usage(compiled.asm["cubin"], compiled.metadata.shared)


def compiled_kernel(launch: Launch, arch: int) -> CompiledKernel:
    """The kernel of a launch compiled for sm_<arch>, as Triton's run time would specialise it for aligned tensors."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind = _kind(launch, parameter.name, value)
        if kind.startswith("="):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind
        aligned = not parameter.do_not_specialize_on_alignment
        if kind.startswith("*") and aligned or kind == "i32" and not parameter.do_not_specialize and value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: launch.arguments[name] for name in OPTIONS if name in launch.arguments}
    return triton.compile(ASTSource(launch.kernel, signature, constants, attributes),
                          target=GPUTarget("cuda", arch, 32), options=options)


def _usage(cubin: bytes, shared: int) -> Usage:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, sass = (subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
                           for option in ("--dump-resource-usage", "-sass"))
    registers, stack = (int(re.search(rf"{name}:(\d+)", resources).group(1)) for name in ("REG", "STACK"))
    return Usage(registers, stack, shared, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--op", nargs="+", choices=ops.__all__, default=ops.__all__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    chosen = parser.parse_args()
    print(f"Triton {triton.__version__}, torch {torch.__version__}\n")
    print("| sm | preset | dtype | kernel | grid | warps | registers | stack | shared | instructions |")
    print("|---" * 10 + "|")
    too_large = 0
    for preset, dtype, launch in matrix(chosen.preset, chosen.op, chosen.dtype):
        for arch in chosen.arch:
            usage = compile_launch(launch, arch)
            too_large += usage.shared > SHARED_LIMIT[arch]
            print(f"| {arch} | {preset} | {dtype} | {launch.kernel.__name__} | {launch.grid[0]} | "
                  f"{launch.arguments['num_warps']} | {usage.registers} | {usage.stack} | {usage.shared} | "
                  f"{usage.instructions} |", flush=True)
    if too_large:
        raise SystemExit(f"{too_large} kernels need more shared memory than the chip has.")


if __name__ == "__main__":
    main()
