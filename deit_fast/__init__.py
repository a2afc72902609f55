"""deit_fast: train, compare and serve small Vision Transformers.

    model = deit_fast.create_model("deit_nano_distilled_patch4_32", num_classes=10)
    with deit_fast.use_backend("reference"):
        logits = model(images)
    serve = deit_fast.freeze(model.eval())  # for a CPU: serve(images)
"""

from deit_fast import ops
from deit_fast.backend import BackendError, backends, use_backend
from deit_fast.models import create_model, freeze, list_models

__version__ = "0.1.0"

__all__ = ["BackendError", "backends", "create_model", "freeze", "list_models", "ops", "use_backend"]
