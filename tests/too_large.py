"""A kernel that does not fit into the chip, for what must happen then."""

from __future__ import annotations

from triton.runtime.errors import OutOfResources


class TooLarge:
    """Stands for a Triton kernel that needs more shared memory than there is, which Triton says when it is launched."""

    __name__ = "too_large_kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def launch(**arguments: object) -> None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return launch
