"""Checkpoints: plain dicts of tensors, numbers and strings that load without running code.

`torch.load` of an arbitrary pickle executes whatever the file says. With `weights_only=True` it builds nothing but
tensors and plain containers, so a checkpoint from elsewhere is safe to open; the price is that no dataclass, Path or
NumPy scalar may go in. `save` checks that, because a checkpoint that cannot be loaded is noticed a night too late.

PyTorch does not compare the checksums of its zip archive (a flipped byte in a weight loads silently), so `load` does,
once per resume. A file carries the key `format_version`; a newer version is refused instead of half understood.

Names of parameters are stored without the prefixes that wrappers put before them: `module.` (DistributedDataParallel)
and `_orig_mod.` (torch.compile).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from deit_fast.errors import CheckpointError
from deit_fast.models.load import clean_name, plain_weights
from deit_fast.training.files import atomic_write

FORMAT = "deit_fast checkpoint"
FORMAT_VERSION = 1
_SCALARS = (str, int, float, bool, type(None))
# What torch.load raises for a sound zip archive that is no checkpoint: its own errors, and those of a pickle that
# holds something else. Damaged archives do not get that far (see _check_archive).
_FOREIGN = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)

# What zipfile raises for damaged headers, found by flipping every byte of a checkpoint.
_DAMAGED = (
    zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, ValueError, struct.error, zlib.error,
)


def save(path: str | os.PathLike[str], state: dict) -> None:
    """Writes `state`, a dict of plain values and tensors, atomically to `path`; TypeError names what is not plain."""
    reserved = {"format", "format_version"} & state.keys()
    if reserved:
        raise ValueError(f"checkpoint.save: the keys {sorted(reserved)} are written by save itself; rename yours")
    _check_plain(state, "state")
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}
    atomic_write(path, lambda file: torch.save(document, file))


def load(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict:
    """Returns the dict that `save` was given, its tensors on `map_location`."""
    path = Path(path)
    _check_archive(path)
    try:
        document = torch.load(path, map_location=map_location, weights_only=True)
    except _FOREIGN as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of deit_fast (PyTorch cannot read it as plain tensors: "
            f"{_first_line(error)}). Give a last.pt or best.pt that deit_fast.train wrote."
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of deit_fast (it lacks the key 'format'). Give a last.pt or best.pt that "
            "deit_fast.train wrote; to start from other weights use --finetune."
        )
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format version {version}, this deit_fast reads version {FORMAT_VERSION}. "
            "Use the deit_fast that wrote it, or start a new run."
        )
    return {key: value for key, value in document.items() if key not in ("format", "format_version")}


def check_matches(path: str | os.PathLike[str], state: Mapping, **expected: object) -> None:
    """Returns None when `state[key] == value` for every expected key; otherwise CheckpointError names both sides.

    `check_matches(path, state, model_name="vit_nano_patch4_32", num_classes=10)`.
    """
    missing = [key for key in expected if key not in state]
    if missing:
        raise CheckpointError(f"{path} does not say its {', '.join(missing)}. Start a new run.")
    different = [key for key, value in expected.items() if state[key] != value]
    if different:
        theirs = ", ".join(f"{key} {state[key]!r}" for key in different)
        ours = ", ".join(f"{key} {expected[key]!r}" for key in different)
        raise CheckpointError(
            f"{path} is a checkpoint of another model: it has {theirs}, this run has {ours}. "
            "Run with the checkpoint's settings, or start anew with another --output-dir."
        )


def save_weights(
    path: str | os.PathLike[str], model_state: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None
) -> None:
    """Writes a model's state dict as safetensors, atomically; metadata values that are no strings are stored as JSON.

    Tensors are copied to the CPU one by one, so weights that share memory are written twice and load independently.
    """
    tensors = {
        clean_name(name): value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model_state.items()
    }
    strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    data = safetensors.torch.save(tensors, {"format": "pt", **strings})
    atomic_write(path, lambda file: file.write(data))


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the state dict, on the CPU, of a .safetensors file, a checkpoint of ours, or a foreign .pt / .pth.

    Foreign files are read with `weights_only`, which here lets an argparse.Namespace pass: DeiT's own training puts its
    arguments beside the weights, and such an object runs no code. `models.load.plain_weights` says where weights are
    looked for.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        _check_readable(path)
        try:
            weights = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file or is damaged ({_first_line(error)}). Fetch it again."
            ) from error
    else:
        _check_archive(path)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except _FOREIGN as error:
            raise CheckpointError(
                f"{path} holds more than plain weights ({_first_line(error)}). Load it with software you trust and "
                "save only its state dict."
            ) from error
    weights = plain_weights(weights) if isinstance(weights, Mapping) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors. Give a file of model weights.")
    return weights


def rng_state() -> dict[str, Tensor]:
    """Returns the state of torch's CPU generator (`cpu`) and of every CUDA device's (`cuda:0`, ...), uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Puts `rng_state()` back. Devices that this machine lacks are left out: a GPU run can go on on a CPU, then not
    bit for bit."""
    torch.set_rng_state(states["cpu"].cpu())
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{index}"].cpu(), index)


def _check_plain(value: object, where: str) -> None:
    # Exact types: numpy.float64 is a float to isinstance, but not to the weights_only unpickler.
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in _SCALARS:
                raise TypeError(f"checkpoint.save: {where} has a key of type {type(key).__name__}; use str or int")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in _SCALARS and not isinstance(value, Tensor):
        raise TypeError(
            f"checkpoint.save: {where} is of type {type(value).__name__}; only tensors, dict, list, tuple, str, int, "
            "float, bool and None load again with weights_only"
        )


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist. Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Give a readable file.") from error


def _check_archive(path: Path) -> None:
    """Raises CheckpointError unless `path` is a whole zip archive whose checksums hold."""
    _check_readable(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty. Use another checkpoint (best.pt?) or start a new run.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path} is truncated or not a PyTorch checkpoint ({_first_line(error)}). "
            "Use another checkpoint (best.pt?) or start a new run."
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of {damaged} is wrong. Use another checkpoint or start a new run."
        )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
