"""Compiles every Triton kernel that the presets' shapes select, without a GPU, and prints what the chip gets.

    python scripts/cubins.py [--arch 80 90 100] [--op attention ...] [--kernel fwd ...] [--dtype bf16 ...]
                             [--preset NAME ...] [--batch 64 ...] [--mode train ...] [--update]

The launchers run on `meta` tensors while `common.recording()` collects their launches, so kernels, constants and
specialisations are those of a real run, each compiled once. Columns: registers per thread, stack bytes (spills),
dynamic shared memory per program in bytes, SASS instructions. It ends with an error where a kernel needs more shared
memory than the chip has, or spills more than tests/triton_spills.txt has written down; `--update` writes what it
compiled there. One architecture takes an hour of one core; Triton's cache makes another run short, and any option
cuts it in pieces.

Covered: the presets; fp32, TF32, fp16, bf16, 16-bit activations with fp32 parameters; the batches in BATCHES; a
training step as the preset has it, one with every dropout and drop-path, inference; blocks, heads, each kind of the
loss, augment. Not covered: other widths and image sizes (`img_size=384`), models without biases, frozen parameters
(whose gradients are left out), labels of the loss in 16 bits, tensors that do not begin at 16 bytes, fp32 products at
torch's other settings. Products that cuBLAS takes (widths that `linear.fused` refuses) are no kernels of ours.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
from deit_fast.kernels.triton.common import HOPPER, Launch, recording  # noqa: E402
from deit_fast.models.presets import PRESETS  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per program, CUDA programming guide
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
            torch.int32: "*i32", torch.uint8: "*u8"}
DTYPES = {"fp32": (torch.float32, torch.float32), "tf32": (torch.float32, torch.float32),
          "fp16": (torch.float16, torch.float16), "fp16mixed": (torch.float16, torch.float32),
          "bf16": (torch.bfloat16, torch.bfloat16), "bf16mixed": (torch.bfloat16, torch.float32)}
LEDGER = Path(__file__).resolve().parents[1] / "tests" / "triton_spills.txt"
MODES = ("train", "regularised", "inference")
BATCHES = (64, 1024, 128, 1, 2, 4, 8, 16, 32)  # other powers of two choose none but their tiles
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


def block_calls(preset: str, dtype: str, batch: int = 64, mode: str = "train") -> dict[str, tuple]:
    """op -> the arguments of its call in a training step of the preset, as meta tensors.

    mode: "train"; "regularised", with every dropout and drop-path, which no preset switches on by itself; "inference",
    without the preset's dropout.
    """
    settings = PRESETS[preset]
    x_dtype, w_dtype = DTYPES[dtype]
    C, H, K = settings["embed_dim"], settings["num_heads"], settings["num_classes"]
    prefix = 1 if settings.get("tokens", "cls") == "cls" else 2
    N = prefix + (settings["img_size"] // settings["patch_size"]) ** 2
    p = {"train": settings.get("drop_rate", 0.0), "regularised": 0.1, "inference": 0.0}[mode]
    attn_p = 0.1 if mode == "regularised" else 0.0
    seed = _meta(torch.int64) if p else None
    scale = _meta(torch.float32, batch) if mode == "regularised" else None

    def x(*shape: int) -> Tensor:
        return _meta(x_dtype, *shape)

    def w(*shape: int) -> Tensor:
        return _meta(w_dtype, *shape)

    return {
        "layernorm_linear": (x(batch, N, C), w(C), w(C), w(3 * C, C), w(3 * C), 1e-6),
        "attention": (x(batch, N, 3 * C), H, None, attn_p, seed if attn_p else None),
        "linear_residual": (x(batch, N, C), w(C, C), w(C), x(batch, N, C), p, seed, scale),
        "layernorm_mlp": (x(batch, N, C), w(C), w(C), w(4 * C, C), w(4 * C), w(C, 4 * C), w(C), 1e-6, p, seed, scale),
        "encoder_block": (x(batch, N, C), w(C), w(C), w(3 * C, C), w(3 * C), w(C, C), w(C), w(C), w(C), w(4 * C, C),
                          w(4 * C), w(C, 4 * C), w(C), H, 1e-6, p, attn_p, seed, scale, scale),
        "distillation_loss": (x(batch, K), x(batch, K), _meta(torch.int64, batch), x(batch, K), "soft", 0.5, 3.0,
                              "batchmean", 0.0),
    }


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def more_calls(preset: str, dtype: str, batch: int, save: bool) -> list[tuple[str, tuple]]:
    """(op, call) of what lies around the blocks: the heads and, where forward saves, each kind of the loss."""
    settings, (x_dtype, w_dtype) = PRESETS[preset], DTYPES[dtype]
    C, K = settings["embed_dim"], settings["num_classes"]
    logits, teacher, norm = _meta(x_dtype, batch, K), _meta(torch.float32, batch, K), _meta(w_dtype, C)
    calls = [("layernorm_linear", (_meta(x_dtype, batch, C), norm, norm, _meta(w_dtype, K, C), _meta(w_dtype, K),
                                   1e-6))]
    for target in (_meta(torch.float32, batch, K), _meta(torch.int64, batch)) if save else ():
        for kind in ("none", "hard", "soft"):
            given = (None, None) if kind == "none" else (logits, teacher)
            calls.append(("distillation_loss", (logits, given[0], target, given[1], kind, 0.5, 3.0, "batchmean", 0.0)))
    return calls


def launches_of(op: str, call: tuple, needs: list[bool] | None = None, save: bool = True,
                arch: int = HOPPER) -> list[Launch]:
    """The launches of an op's forward and, if it saves, backward, for the gradients in `needs` (all, if None)."""
    native, module = native_op(op), importlib.import_module(f"deit_fast.kernels.triton.{op}")
    needs = [call[i] is not None for i in native.grads] if needs is None else needs
    with recording(arch) as found:
        out, saved = module.forward(*call, save=save)
        if save:
            call = tuple(None if i == native.added else argument for i, argument in enumerate(call))
            module.backward(out.new_empty(out.shape), saved, needs, *call)
    return found


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """torch's own setting of fp32 products as the column `dtype` has it: TF32 in "tf32", fp32 in all others."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def preset_launches(preset: str, dtype: str, batch: int, mode: str, names: Collection[str],
                    arch: int = HOPPER) -> list[Launch]:
    """All launches of these ops in one training step ("train", "regularised") or one call for "inference"."""
    save = mode != "inference"
    calls = [*block_calls(preset, dtype, batch, mode).items(), *more_calls(preset, dtype, batch, save)]
    with products(dtype):
        return [launch for op, call in calls if op in names and (save or op != "distillation_loss")
                for launch in launches_of(op, call, save=save, arch=arch)]


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


@dataclass(frozen=True)
class Cell:
    """A launch and the first column of the matrix that makes it."""

    preset: str
    dtype: str
    batch: int
    mode: str
    launch: Launch


def matrix(presets: Collection[str], names: Collection[str], dtypes: Collection[str],
           batches: Collection[int] = BATCHES, modes: Collection[str] = MODES, arch: int = HOPPER) -> Iterator[Cell]:
    """Every distinct kernel that these presets launch on sm_<arch>, once."""
    seen = set()
    for preset, dtype, batch, mode in itertools.product(presets, dtypes, batches, modes):
        found = preset_launches(preset, dtype, batch, mode, names, arch)
        if "augment" in names and batch == 64 and mode == "train":  # whose kernels do not depend on the batch
            for options in AUGMENT_OPTIONS:
                found += augment_launches(PRESETS[preset]["img_size"], DTYPES[dtype][0], **options)
        for launch in found:
            if specialisation(launch) not in seen:
                seen.add(specialisation(launch))
                yield Cell(preset, dtype, batch, mode, launch)


def specialisation(launch: Launch) -> str:
    """The kernel's name, then dtypes and constants by argument: equal for launches that share one compiled kernel."""
    values = {name: _kind(launch, name, value) for name, value in launch.arguments.items()}
    return " ".join([launch.kernel.__name__, *(f"{name}{kind}" if kind.startswith("=") else f"{name}:{kind}"
                                               for name, kind in sorted(values.items()))])


def sixteen_bit_forward(launch: Launch) -> bool:
    """Whether this is a forward kernel on 16-bit activations, which must not spill."""
    dtypes = {value.dtype for value in launch.arguments.values() if isinstance(value, Tensor)}  # tuples: of gradients
    return "bwd" not in launch.kernel.__name__ and bool(dtypes & {torch.float16, torch.bfloat16})


class Ledger:
    """tests/triton_spills.txt: stack bytes of each kernel that spills, as compiled by one version of Triton.

    Kernels that are not in it spill nothing, nor do forward kernels of 16 bits on Hopper. Another version spills
    elsewhere: then only these are judged.
    """

    def __init__(self, path: Path = LEDGER) -> None:
        first, *rows = path.read_text().splitlines()
        self.path, self.version = path, first.split()[-1]
        self.bytes = {key: int(stack) for stack, key in (row.split(" ", 1) for row in rows)}

    def allowed(self, launch: Launch, arch: int) -> float:
        """The most stack bytes per thread of a launch on sm_<arch>."""
        if sixteen_bit_forward(launch) and arch == HOPPER:
            return 0
        if self.version != triton.__version__:
            return float("inf")
        return self.bytes.get(f"sm_{arch} {specialisation(launch)}", 0)

    def update(self, stacks: dict[str, int]) -> None:
        """Takes over what was compiled, key -> stack bytes, drops what another version left, and writes the file."""
        kept = self.bytes if self.version == triton.__version__ else {}
        self.bytes = {key: stack for key, stack in {**kept, **stacks}.items() if stack}
        self.version = triton.__version__
        rows = [f"{self.bytes[key]} {key}" for key in sorted(self.bytes)]
        self.path.write_text("\n".join([f"Stack bytes per thread, architecture, kernel: Triton {self.version}",
                                        *rows]) + "\n")


def _kind(launch: Launch, name: str, value: object) -> str:
    if isinstance(value, tuple) and all(isinstance(each, Tensor) for each in value):
        return "(" + ",".join(POINTERS[each.dtype] for each in value) + ")"
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
        if kind.startswith("("):
            signature[parameter.name] = tuple(POINTERS[each.dtype] for each in value)
            attributes.update({(i, j): [["tt.divisibility", 16]] for j in range(len(value))})
            continue
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
    parser.add_argument("--kernel", nargs="+", help="only kernels with one of these in their name")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--update", action="store_true", help="write spills down, judge none")
    chosen = parser.parse_args()
    print(f"Triton {triton.__version__}, torch {torch.__version__}\n")
    print("| sm | preset | dtype | batch | mode | kernel | grid | warps | registers | stack | shared | instructions |")
    print("|---" * 12 + "|")
    ledger, stacks, refused, lower = Ledger(), {}, [], []
    for arch in chosen.arch:
        for cell in matrix(chosen.preset, chosen.op, chosen.dtype, chosen.batch, chosen.mode, arch):
            launch, name = cell.launch, cell.launch.kernel.__name__
            if chosen.kernel and not any(part in name for part in chosen.kernel):
                continue
            usage, key = compile_launch(launch, arch), f"sm_{arch} {specialisation(launch)}"
            stacks[key] = usage.stack
            print(f"| {arch} | {cell.preset} | {cell.dtype} | {cell.batch} | {cell.mode} | {name} | {launch.grid[0]} | "
                  f"{launch.arguments['num_warps']} | {usage.registers} | {usage.stack} | {usage.shared} | "
                  f"{usage.instructions} |", flush=True)
            if usage.shared > SHARED_LIMIT[arch]:
                refused.append(f"{usage.shared} bytes of shared memory, of {SHARED_LIMIT[arch]}: {key}")
            allowed = ledger.allowed(launch, arch)
            if usage.stack > allowed and (sixteen_bit_forward(launch) and arch == HOPPER or not chosen.update):
                refused.append(f"{usage.stack} bytes of spills, allowed are {allowed}: {key}")
            elif usage.stack < allowed < float("inf") and not chosen.update:
                lower.append(f"{allowed} may be lowered to {usage.stack}: {key}")
    if chosen.update:
        ledger.update(stacks)
    elif ledger.version != triton.__version__:
        print(f"\n{LEDGER.name} was made by Triton {ledger.version}: spills are not held against it.")
    spilling = {}
    for key, stack in stacks.items():
        if stack:
            spilling.setdefault(" ".join(key.split()[:2]), []).append(stack)
    print(f"\n{len(stacks)} kernels, {sum(map(len, spilling.values()))} spill:")
    print(*(f"  {name}: {len(found)}, at most {max(found)} bytes" for name, found in spilling.items()), *lower,
          sep="\n")
    if refused:
        raise SystemExit("\n".join(refused))


if __name__ == "__main__":
    main()
