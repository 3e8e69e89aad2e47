"""A checkpoint directory of config.json alone: enough for the shapes of a model, and for programs that need no more."""

from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxserve.formats import Blocks


class NoTensors:
    """A Checkpoint that has no names, so that nothing of it can be asked for."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config

    def names(self) -> frozenset[str]:
        return frozenset()

    def shape(self, name: str) -> tuple[int, ...]:
        self._lacks(name)

    def dtype(self, name: str) -> np.dtype:
        self._lacks(name)

    def read(self, name: str) -> np.ndarray:
        self._lacks(name)

    def blocks(self, name: str) -> Blocks | None:
        self._lacks(name)

    def release(self, name: str) -> None:
        self._lacks(name)

    def nbytes(self, name: str) -> int:
        self._lacks(name)

    def _lacks(self, name: str) -> NoReturn:
        raise KeyError(f"{self.path} holds config.json alone, and no {name}")
