"""What a CUDA graph does to a program, on a CPU: a tape of PyTorch's operators, replayed on the very same tensors.

Like a graph, a replay runs no Python of the recorded call: numbers are those of the recording, attributes that the call
rebinds are not bound again, and everything is read and written where it lay. Like a capture, a recording has no effect
(here: everything that it read or wrote is put back, whether it succeeds or not) and refuses what needs a value on the
host or a copy of host memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from deit_fast.training.graphs import CannotCapture

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)
FROM_HOST = (torch.ops.aten.lift_fresh.default,)  # torch.tensor([...]): on a GPU a copy from pageable memory


class Refused(RuntimeError):
    """What a CUDA stream that captures says to an operator that it cannot take."""


class Tape(TorchDispatchMode):
    """Collects (operator, arguments, keywords, outputs, which of them are new memory), and what memory held before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of storages that existed before
        self.made: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in READS or function in FROM_HOST:
            raise Refused(str(function))
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        for tensor in given:  # of every operator: batch norm's schema does not say that it writes its running averages
            self._remember(tensor)
        out = function(*args, **kwargs)
        memory = {_address(tensor) for tensor in given}
        outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        new = [_address(tensor) not in memory for tensor in outputs]
        self.made |= {_address(tensor) for tensor, fresh in zip(outputs, new) if fresh}
        self.calls.append((function, args, kwargs, outputs, new))  # keeps every tensor alive: no address is used twice
        return out

    def _remember(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address not in self.made and address not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[address] = (whole, whole.clone())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tapes:
    """The Recorder of `graphs.GraphedSteps` on a CPU. recorded: the number of operators on each tape."""

    def __init__(self) -> None:
        self.warm, self.recorded, self.replayed = 0, [], 0

    def warm_up(self, call: Callable[[], None]) -> None:
        self.warm += 1
        call()

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        random, tape = torch.get_rng_state(), Tape()
        try:
            with tape:
                call()
        except Refused as error:
            raise CannotCapture(str(error)) from error
        finally:
            torch.set_rng_state(random)
            for whole, saved in tape.before.values():
                whole.copy_(saved)
        self.recorded.append(len(tape.calls))

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for function, args, kwargs, outputs, new in tape.calls:
                    again = [x for x in tree_flatten(function(*args, **kwargs))[0] if isinstance(x, Tensor)]
                    for kept, fresh, is_new in zip(outputs, again, new, strict=True):
                        if is_new:
                            kept.copy_(fresh)

        return replay
