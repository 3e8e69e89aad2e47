"""Reads and writes Orbax checkpoint directories: config.json, the tokenizer's files, and the tensors in `params/`.

`params/` is one Orbax PyTree: a flat dict from the tensors' Hugging Face names to arrays.
"""

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.weights import CONFIG, ORBAX_PARAMS
from jaxserve.weights.problems import Problems

_CURE = "copy it again, or write it again with `jaxserve convert`"


class OrbaxCheckpoint:
    """The tensors under `params/`, restored one by one when they are asked for."""

    def __init__(self, path: Path, config: dict[str, Any]):
        """Raises CheckpointError unless `params/` is a complete Orbax PyTree of names to arrays."""
        self.path = path
        self.config = config
        self._params = (path / ORBAX_PARAMS).resolve()
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        if not (self._params / "_METADATA").is_file():
            raise CheckpointError(f"{self._params}: not a complete Orbax PyTree (no _METADATA); {_CURE}")
        try:
            # Where the data files are damaged, Orbax logs why and returns None.
            found = self._checkpointer.metadata(self._params).item_metadata
        except Exception as error:  # what Orbax raises on damaged metadata is not documented
            raise CheckpointError(f"{self._params}: Orbax cannot read its metadata: {error}; {_CURE}") from error
        if found is None:
            raise CheckpointError(f"{self._params}: Orbax cannot read its metadata; {_CURE}")
        tree = found.tree
        problems = Problems(path)
        for name, leaf in tree.items():
            if getattr(leaf, "dtype", None) is None or getattr(leaf, "shape", None) is None:
                problems.add("params/ must be a flat dict of arrays", str(name))
        problems.raise_any()
        self._leaves = tree

    def names(self) -> frozenset[str]:
        return frozenset(self._leaves)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._leaves[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._leaves[name].dtype)

    def blocks(self, name: str) -> None:
        return None

    def release(self, name: str) -> None:
        pass  # nothing is kept

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> np.ndarray:
        wanted = ocp.args.PyTreeRestore(
            item={name: self._leaves[name]},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        try:
            return self._checkpointer.restore(self._params, args=wanted)[name]
        except Exception as error:  # what Orbax raises on damaged data is not documented
            raise CheckpointError(f"{self._params}: Orbax cannot read {name}: {error}; {_CURE}") from error


def save_orbax(
    path: Path,
    config: Mapping[str, Any],
    params: Mapping[str, np.ndarray],
    *,
    dtype: Any = None,
    extra_files: Mapping[str, Path] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a whole checkpoint directory, or nothing: it takes its name only when it is complete.

    `extra_files` come along under the names given. Memory-mapped params are written from the map, not copied. `dtype`
    casts them; `progress(written, total)` counts bytes. Raises ConfigError if `path` exists and is not an empty
    directory, or if `path`.tmp exists.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty directory; remove it or name another")
    staging = path.with_name(path.name + ".tmp")
    try:
        staging.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(f"{staging} exists: another run is writing it, or one was killed; then remove it") from error
    try:
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name, file in extra_files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, staging / name)
        total = sum(p.size * np.dtype(dtype or p.dtype).itemsize for p in params.values())
        with _watch(staging / ORBAX_PARAMS, total, progress), ocp.Checkpointer(_writer()) as checkpointer:
            save_args = {name: ocp.SaveArgs(dtype=dtype and np.dtype(dtype)) for name in params}
            args = ocp.args.PyTreeSave(dict(params), save_args=save_args)
            checkpointer.save((staging / ORBAX_PARAMS).resolve(), args=args)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _writer() -> ocp.PyTreeCheckpointHandler:
    # The defaults copy every host array and compress it in memory. Weights hardly compress; without both,
    # tensorstore writes straight from the caller's (memory-mapped) arrays.
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)


@contextmanager
def _watch(target: Path, total: int, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Reports the bytes that lie under `target`, or under Orbax's temporary name for it, while the body runs."""
    if progress is None:
        yield
        return
    report, stop = progress, threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            try:
                files = [f for d in target.parent.glob(target.name + "*") for f in d.rglob("*") if f.is_file()]
                report(min(total, sum(f.stat().st_size for f in files)), total)
            except OSError:
                pass  # Orbax renames its temporary directory under our feet

    progress(0, total)
    watcher = threading.Thread(target=watch, name="convert-progress")
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    progress(total, total)
