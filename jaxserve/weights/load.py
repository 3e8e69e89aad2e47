"""Fits a checkpoint to a model's ParamSpecs and puts it on the device; knows neither formats nor meshes."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxserve.formats import Blocks
from jaxserve.quant import stack
from jaxserve.spec import Model, Params, ParamSpec
from jaxserve.weights import FLOATS, Checkpoint
from jaxserve.weights.problems import Problems


def load_params(
    model: Model,
    config: Any,
    checkpoint: Checkpoint,
    *,
    dtype: Any,
    device_put: Callable[[Any, ParamSpec], Any],
    divide: Callable[[list[np.ndarray], ParamSpec], Any] | None = None,
    pack: Callable[[np.ndarray | Blocks, ParamSpec], Any] | None = None,
    keep: Callable[[Callable[[int], np.ndarray | Blocks], ParamSpec], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> Params:
    """The model's tree of parameters: each read, given its spec's shape, cast to `dtype` and put on the device.

    A matrix (`ParamSpec.matrix`) goes through `pack` instead, where that is given: [N, K] as it is stored, quantised or
    not, to the leaf that `device_put` then gets. Experts are packed one by one and then stacked.

    `keep` has the first word on a matrix or a stack of them: given a function that reads the i-th as it is stored, it
    puts them on their devices, quantised, and returns the leaf, or None for one that is to be plain numbers.

    `divide` takes the place of all the rest, for weights of several devices: it gets the leaf's tensors as the
    checkpoint has them, which may be memory maps that have not been read yet, and reads of them what it needs.

    `threads` leaves (default: one a core, at most 8) are on their way at a time, so the host holds no more than that.
    Two specs may name one tensor, or rows of it. `progress(done, total)` counts the checkpoint's bytes.
    Raises one CheckpointError with every tensor that is missing, unexpected, misshapen or of a dtype that is not
    float32, bfloat16 or float16; nothing is read in that case.
    """
    specs, tree = jax.tree.flatten(model.param_specs(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    assert all(isinstance(spec, ParamSpec) for spec in specs), "every leaf of param_specs is a ParamSpec"
    _check(specs, checkpoint, model.unused)

    sizes = [_nbytes(spec, checkpoint) for spec in specs]
    total, done, lock = sum(sizes), 0, threading.Lock()

    def load(spec: ParamSpec, nbytes: int) -> Any:
        nonlocal done
        # Waiting here is what bounds the staging: a thread takes its next leaf when this one has arrived.
        if (kept := on_devices(spec)) is not None:
            array = jax.block_until_ready(kept)
        elif divide is not None:
            tensors = [_rows(checkpoint.read(name), spec) for name in spec.names]
            array = jax.block_until_ready(divide(tensors, spec))
        else:
            array = jax.block_until_ready(device_put(whole(spec), spec))
        for name in spec.names:
            checkpoint.release(name)
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)
        return array

    def on_devices(spec: ParamSpec) -> Any:
        if keep is None or not spec.matrix or len(checkpoint.shape(spec.names[0])) != 2:
            return None
        return keep(lambda i: _matrix(checkpoint, spec, spec.names[i]), spec)

    def whole(spec: ParamSpec) -> Any:
        if pack is not None and spec.matrix and len(checkpoint.shape(spec.names[0])) == 2:
            packed = (pack(w, spec) for w in _matrices(checkpoint, spec))
            return stack(packed, len(spec.names)) if spec.spread else next(packed)
        if spec.spread:
            host = np.empty(spec.shape, dtype)
            for i, name in enumerate(spec.names):
                host[i] = checkpoint.read(name).astype(dtype).reshape(spec.tensor_shape)
                checkpoint.release(name)
            return host
        stored = _rows(checkpoint.read(spec.name), spec)
        # A read-only array is the file itself: copy it, so that nothing that befalls the file later reaches us.
        # A part of an array would keep all of it.
        copy = spec.rows is not None or not stored.flags.writeable
        return stored.astype(dtype, copy=copy).reshape(spec.shape)

    if progress is not None:
        progress(0, total)
    pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1), thread_name_prefix="load")
    try:
        # The largest first: what is staged for it is gone when the others have filled the memory.
        order = sorted(range(len(specs)), key=lambda i: -sizes[i])
        leaves = dict(zip(order, pool.map(load, [specs[i] for i in order], [sizes[i] for i in order]), strict=True))
        return jax.tree.unflatten(tree, [leaves[i] for i in range(len(specs))])
    finally:
        pool.shutdown(cancel_futures=True)


def _matrices(checkpoint: Checkpoint, spec: ParamSpec) -> Iterator[np.ndarray | Blocks]:
    """The spec's, one by one, as they are stored; memory need not hold one when the next is asked for."""
    for name in spec.names:
        yield _matrix(checkpoint, spec, name)
        if spec.spread:
            checkpoint.release(name)


def _matrix(checkpoint: Checkpoint, spec: ParamSpec, name: str) -> np.ndarray | Blocks:
    blocks = checkpoint.blocks(name)
    return _rows(checkpoint.read(name), spec) if blocks is None else Blocks(blocks.format, _rows(blocks.rows, spec))


def _rows(stored: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """The spec's rows of a tensor: a view."""
    return stored if spec.rows is None else stored[slice(*spec.rows)]


def _nbytes(spec: ParamSpec, checkpoint: Checkpoint) -> int:
    """What the spec's rows, or tensors, have in the checkpoint."""
    nbytes = sum(checkpoint.nbytes(name) for name in spec.names)
    if spec.rows is None:
        return nbytes
    return nbytes * (spec.rows[1] - spec.rows[0]) // checkpoint.shape(spec.name)[0]


def check_params(model: Model, config: Any, checkpoint: Checkpoint) -> None:
    """Raises what `load_params` would raise, without reading a tensor."""
    specs = jax.tree.leaves(model.param_specs(config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    _check(specs, checkpoint, model.unused)


def ignored(name: str, tied: bool) -> bool:
    """Whether a tensor that no spec names may be passed over; `tied`: the config does not deny tied embeddings."""
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _check(specs: list[ParamSpec], checkpoint: Checkpoint, unused: Callable[[str], bool]) -> None:
    problems = Problems(checkpoint.path)
    held = checkpoint.names()
    ends: dict[str, int] = {}
    for spec in specs:
        if spec.rows is not None:
            ends[spec.name] = max(spec.rows[1], ends.get(spec.name, 0))
    wanted = [(name, leaf) for leaf in specs for name in leaf.names]
    for name, spec in wanted:
        if name not in held:
            problems.add("missing tensor", name)
            continue
        found = checkpoint.shape(name)
        needed = spec.tensor_shape if spec.rows is None else (ends[name], spec.shape[-1])
        if not splits(found, needed):
            problems.add("misshapen tensor", f"{name} is {list(found)}, the model needs {list(needed)}")
        if checkpoint.dtype(name) not in FLOATS:
            kinds = ", ".join(d.name for d in FLOATS)
            problems.add(f"unsupported dtype, not of {kinds}", f"{name} is {checkpoint.dtype(name).name}")
        elif spec.names[0] in held and checkpoint.dtype(name) != checkpoint.dtype(spec.names[0]):
            problems.add("unlike the others of its stack", f"{name} is {checkpoint.dtype(name).name}")
    tied = checkpoint.config.get("tie_word_embeddings") is not False
    for name in held.difference(name for name, _ in wanted):
        if not ignored(name, tied) and not unused(name):
            problems.add("unexpected tensor", name)
    problems.raise_any()


def splits(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether `shape` keeps the stored axes or splits them in order: [48, 64] may be [4, 12, 64], never [64, 48]."""
    axes = [n for n in shape if n != 1]
    for size in (n for n in stored if n != 1):
        run = 1
        while axes and run != size and size % (run * axes[0] or 1) == 0:
            run *= axes.pop(0)
        if run != size:
            return False
    return not axes
