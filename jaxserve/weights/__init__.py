"""What a checkpoint is, and which reader a file or directory needs; the readers are the siblings."""

import json
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import Blocks
from jaxserve.gguf import find_gguf
from jaxserve.weights import safetensors

FLOATS = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))
"""The dtypes that weights may be stored in."""

CONFIG = "config.json"
ORBAX_PARAMS = "params"
"""Subdirectory of an Orbax checkpoint that holds the tensors."""


class Checkpoint(Protocol):
    """Named tensors of a checkpoint directory or GGUF file, each read when it is asked for."""

    path: Path
    config: dict[str, Any]
    """What config.json holds, or would hold."""

    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str) -> np.ndarray:
        """One tensor: a read-only view of a memory map, or an array of its own. Threads may read at once.

        Of a quantised one the float32 values.
        """
        ...

    def blocks(self, name: str) -> Blocks | None:
        """A quantised tensor as it is stored; None for any other."""
        ...

    def release(self, name: str) -> None:
        """The tensor will not be needed soon: memory need not hold what was read of it."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes that the tensor has in the checkpoint."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """The reader for what the directory holds, or for a GGUF file; no tensor is read.

    A directory's only GGUF file, or split, counts where it holds nothing else that is read. Of a checkpoint with a
    vision tower it is the text part. One without its output matrix has the names of the whole.
    Raises ConfigError if there is no checkpoint or its model is not served, CheckpointError if it is damaged.
    """
    if not path.is_dir() and not path.is_file():
        raise ConfigError(f"no checkpoint directory or file {path}")
    if (file := find_gguf(path)) is not None:
        from jaxserve.weights.gguf import GgufCheckpoint  # the formats, which other checkpoints do without

        return GgufCheckpoint(file)
    if path.is_file():
        raise ConfigError(f"{path} is not a GGUF file; give the directory that holds config.json and the weights")
    if (checkpoint := _open_directory(path, _read_config(path / CONFIG))) is not None:
        from jaxserve.weights.headless import with_head_names  # which need this module
        from jaxserve.weights.text_part import text_part

        return with_head_names(text_part(checkpoint))
    held = _weight_files(path)
    raise ConfigError(
        f"{path} holds no {safetensors.SINGLE}, no {safetensors.INDEX}, no GGUF file and no Orbax {ORBAX_PARAMS}/"
        + (f"; it holds {', '.join(held[:5])}, which this version does not read" if held else "")
    )


def open_config(path: Path) -> dict[str, Any]:
    """What config.json says of a checkpoint's model, as `open_checkpoint` would; the weights need not be there.

    `path` may also be the config.json. Raises ConfigError and CheckpointError.
    """
    if path.is_dir() or find_gguf(path) is not None:
        return open_header(path).config
    from jaxserve.weights.text_part import text_config

    return text_config(_read_config(path), path)


def open_header(path: Path) -> Checkpoint:
    """As `open_checkpoint`, where no tensor will be read: a directory may hold config.json and no weights."""
    without = path.is_dir() and not _weight_files(path) and not (path / ORBAX_PARAMS).is_dir()
    if not without or find_gguf(path) is not None:
        return open_checkpoint(path)
    from jaxserve.weights.no_tensors import NoTensors  # which need this module
    from jaxserve.weights.text_part import text_part

    return text_part(NoTensors(path, _read_config(path / CONFIG)))


def _weight_files(path: Path) -> list[str]:
    """What looks like weights, in formats that are read or not."""
    return sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))


def _open_directory(path: Path, config: dict[str, Any]) -> Checkpoint | None:
    if (path / safetensors.SINGLE).is_file():
        return safetensors.open_single(path, config)
    if (path / safetensors.INDEX).is_file():
        return safetensors.open_sharded(path, config)
    if (path / ORBAX_PARAMS).is_dir():
        from jaxserve.weights.orbax import OrbaxCheckpoint  # seconds to import, and seldom needed

        return OrbaxCheckpoint(path, config)
    return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} holds no {path.name}; a checkpoint directory needs one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config
