"""Other people's inference engines on the report's model, exported from `reference`: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deit_fast import create_model, use_backend

from .models import MODEL
from .timing import Candidates


def inference_engines(batch: int, threads: int) -> Candidates:
    """What is timed for each engine that is installed (by pip install -e '.[bench]'); prints why one is left out."""
    images = torch.randn(batch, 3, 32, 32)
    found: Candidates = {}
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  without ONNX Runtime and OpenVINO: {', '.join(missing)} not installed, which export the model")
        return found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        model = create_model(MODEL).eval()
        with use_backend("reference"), torch.no_grad():
            expected = model(images)
            torch.onnx.export(model, (images,), str(path), dynamo=True, input_names=["images"], external_data=False,
                              verbose=False)
        for name, package, load in (("ONNX Runtime", "onnxruntime", _onnx_runtime),
                                    ("OpenVINO", "openvino", _openvino)):
            if importlib.util.find_spec(package) is None:
                print(f"  without {name}: {package} is not installed")
                continue
            for dtype, call in load(path, images, threads).items():
                error = (torch.as_tensor(call()) - expected).abs().max().item()
                assert error < (1e-3 if dtype == "fp32" else 0.1), f"{name} {dtype} is off by {error}"
                found[f"{name} {dtype}"] = call
    return found


def _onnx_runtime(path: Path, images: Tensor, threads: int) -> dict[str, Callable[[], object]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    array = images.numpy()
    return {"fp32": lambda: session.run(None, {"images": array})[0]}


def _openvino(path: Path, images: Tensor, threads: int) -> dict[str, Callable[[], object]]:
    """In fp32, and in bf16 where the processor multiplies it."""
    import openvino

    core, array = openvino.Core(), images.numpy()
    dtypes = {"fp32": "f32"}
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        dtypes["bf16"] = "bf16"
    calls = {}
    for dtype, hint in dtypes.items():
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        compiled = core.compile_model(str(path), "CPU", settings)
        calls[dtype] = lambda compiled=compiled: compiled(array)[0]
    return calls
