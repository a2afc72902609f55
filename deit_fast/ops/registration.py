"""How native kernels become one differentiable PyTorch operator.

One forward and one backward operator per op serve all native backends: the backend is a `str` in the schema, handed from forward to
backward, so that both halves match. `torch.library.define` + `impl` + `register_fake` with an `autograd.Function` around it
costs 45 us per forward and backward on torch 2.14, `custom_op` with `register_autograd` 76 us.

The kernels of op X for backend Y are the module `deit_fast/kernels/Y/X.py`, which has

    why_not(*call) -> str | None                  why this call cannot be served
    forward(*call, save) -> (out, saved)          saved: list of tensors for backward, empty unless `save`
    saved_like(*call) -> list of tensors          uninitialised, as `forward` would save them
    backward(grad, saved, needs, *call) -> grads  one per differentiable argument; an empty (0,) tensor where not needed

`call` is the op's arguments in the order of its schema. Outputs and saved tensors alias nothing and are contiguous.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deit_fast.backend import KernelError, Offer, Op


def register(name: str, schema: str, impl: Callable, fake: Callable) -> Callable:
    """The operator deit_fast::<name>: `impl` computes it on CPU and CUDA tensors, `fake` gives its outputs' metadata."""
    qualified = f"deit_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("cpu", "cuda"))(impl)
    torch.library.register_fake(qualified)(fake)
    return getattr(torch.ops.deit_fast, name).default


def launchers(op: str, backends: Sequence[str]) -> tuple[dict[str, Offer], dict[str, ModuleType]]:
    """(offers, modules) of an op's kernels; a backend that cannot run on this machine is offered but not imported."""
    offers, modules = {}, {}
    for backend in backends:
        package = importlib.import_module(f"deit_fast.kernels.{backend}")
        if package.why_not() is None:
            modules[backend] = importlib.import_module(f"deit_fast.kernels.{backend}.{op}")
            offers[backend] = Offer(package.why_not, modules[backend].why_not)
        else:
            offers[backend] = Offer(package.why_not)
    return offers, modules


class NativeOp:
    """The native side of an op: its `Op` (backend table) and, called with a backend, its kernels under autograd.

    Args:
        name: of the op, which is also the name of its kernel modules.
        reference: the op in plain PyTorch, `reference(*call)`, which serves where no backend does.
        backends: those that have kernels for it, in the automatic order.
        args: the schema of a call, tensors and settings: "Tensor x, Tensor? bias, float eps".
        grads: the arguments that backward gives gradients for.
        added: the argument that is added to the output unchanged, if there is one: its gradient is the output's, and
            backward neither sees it nor keeps it alive.
        out: `out(*call)` makes an uninitialised output (`x.new_empty(shape)`, never `empty_like`, which copies strides).
        order: `order(*call)` gives the automatic order where it depends on the call.
        parts: the ops whose work this one does in one call.
    """

    def __init__(self, name: str, reference: Callable[..., Tensor], backends: Sequence[str], args: str,
                 grads: Sequence[str], out: Callable[..., Tensor], added: str | None = None,
                 order: Callable[..., tuple[str, ...]] | None = None, parts: tuple[str, ...] = ()) -> None:
        offers, self.modules = launchers(name, backends)
        self.op, self.reference = Op(name, offers, order, parts), reference
        typed = [arg.split() for arg in args.split(", ")]  # [["Tensor", "x"], ...]
        names = [arg[-1] for arg in typed]
        self.grads = [names.index(grad) for grad in grads]
        self.added = None if added is None else names.index(added)
        self.tensors = [i for i, (kind, _) in enumerate(typed) if kind.startswith("Tensor")]
        self.kept = [i for i in self.tensors if i != self.added]
        self.differentiable = self.grads if self.added is None else [*self.grads, self.added]
        self.out = out
        if not offers:
            return
        loose = ", ".join(f"{'Tensor?' if kind == 'Tensor' else kind} {arg}" for kind, arg in typed)
        self.forward = register(f"{name}_forward", f"({args}, bool save, str backend) -> (Tensor, Tensor[])",
                                self._forward, self._forward_fake)
        self.backward = register(f"{name}_backward",
                                 f"(Tensor grad, Tensor[] saved, bool[] needs, {loose}, str backend) -> Tensor[]",
                                 self._backward, self._backward_fake)
        self.function = _make_function(self)

    def __call__(self, requested: str | None, *call: object) -> Tensor:
        """The op's output, differentiable once, by the backend that serves the call.

        requested: the call's `backend=` argument. A kernel that does not compile makes the automatic order step down in
        this very call, in backward to the reference's gradients (of the same seeded masks).
        """
        by_name = self.op.asked(requested) is not None

        def compute(backend: str) -> Tensor:
            if backend == "reference":
                return self.reference(*call)
            if torch.is_grad_enabled() and any(call[i] is not None and call[i].requires_grad
                                               for i in self.differentiable):
                return self.function.apply(backend, by_name, *call)
            return self.forward(*call, False, backend)[0]

        return self.op.run(requested, call, compute)

    def reference_gradients(self, grad: Tensor, needs: Sequence[bool], call: Sequence[object]) -> list[Tensor]:
        """What backward gives, by plain PyTorch: the op computed again under autograd."""
        call = list(call)
        if self.added is not None:
            call[self.added] = torch.zeros_like(grad)  # not kept; it adds nothing to the others' gradients
        wanted = [i for i, need in zip(self.grads, needs) if need]
        for i in wanted:
            call[i] = call[i].detach().requires_grad_()
        with torch.enable_grad():
            out = self.reference(*call)
        found = iter(torch.autograd.grad(out, [call[i] for i in wanted], grad, materialize_grads=True))
        return [next(found) if need else grad.new_empty(0) for need in needs]

    def _forward(self, *args: object) -> tuple[Tensor, list[Tensor]]:
        *call, save, backend = args
        return self.modules[backend].forward(*call, save=save)

    def _forward_fake(self, *args: object) -> tuple[Tensor, list[Tensor]]:
        *call, save, backend = args
        return self.out(*call), self.modules[backend].saved_like(*call) if save else []

    def _backward(self, grad: Tensor, saved: list[Tensor], needs: list[bool], *args: object) -> list[Tensor]:
        *call, backend = args
        return self.modules[backend].backward(grad.contiguous(), saved, needs, *call)

    def _backward_fake(self, grad: Tensor, saved: list[Tensor], needs: list[bool], *args: object) -> list[Tensor]:
        call = args[:-1]
        return [call[i].new_empty(call[i].shape) if need and call[i] is not None else grad.new_empty(0)
                for i, need in zip(self.grads, needs)]


def _make_function(native: NativeOp) -> type[torch.autograd.Function]:
    """The autograd.Function of a native op: an empty body around its two operators."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, backend, by_name, *call):
            out, saved = native.forward(*call, True, backend)
            ctx.save_for_backward(*(call[i] for i in native.kept), *saved)
            ctx.backend, ctx.by_name = backend, by_name
            ctx.settings = [None if i in native.tensors else arg for i, arg in enumerate(call)]
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            tensors = ctx.saved_tensors
            call = list(ctx.settings)
            for i, tensor in zip(native.kept, tensors):
                call[i] = tensor
            saved = list(tensors[len(native.kept):])
            needs = [ctx.needs_input_grad[2 + i] for i in native.grads]
            try:
                computed = native.backward(grad, saved, needs, *call, ctx.backend)
            except KernelError as error:
                if ctx.by_name:
                    raise
                native.op.report_step_down(error, "reference")
                computed = native.reference_gradients(grad, needs, call)
            grads = [None] * (2 + len(call))
            for i, need, tensor in zip(native.grads, needs, computed):
                if need:
                    grads[2 + i] = tensor
            if native.added is not None:
                grads[2 + native.added] = grad
            return tuple(grads)

    Function.__name__ = Function.__qualname__ = f"{native.op.name}_function"
    return Function
