"""Makes other weights, or edited code, ready beside a model that goes on being served; changes nothing of it."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve import quant
from jaxserve.config import ModelOptions
from jaxserve.dry_run import specs_of, trace
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import Blocks
from jaxserve.host_memory import host_memory
from jaxserve.loading import Loaded, Packer, limited, named_for, open_model, packer, place_params, stored_shapes
from jaxserve.models import find_model, own_config
from jaxserve.scaled import Scaled
from jaxserve.sharding import Partition, bytes_per_device
from jaxserve.spec import Params, ParamSpec
from jaxserve.weights import Checkpoint, open_checkpoint
from jaxserve.weights.keep import Keeper, Matrix, keeper
from jaxserve.weights.load import load_params, splits

GIVEN = Path("(the arrays given)")
"""Stands for the checkpoint's path in what is said of a tree of arrays."""


def weights_at(served: Loaded, options: ModelOptions, path: Path, workspace: int) -> Params:
    """The weights of another checkpoint of the same model, placed as those that are served: the same programs take
    them.

    `workspace`: bytes of a device that a step needs while this goes on. Raises ConfigError for another model, or too
    little memory; CheckpointError with every tensor that is missing, unexpected, misshapen or of another format.
    """
    checkpoint = open_checkpoint(path)
    if options.model_code is not None:
        checkpoint = named_for(served.model, checkpoint)
    _check_same_model(served, options, checkpoint)
    _check_room(served, workspace)
    specs = _leaves(specs_of(served.model, served.config))
    pack = _pack_alike(served, options, specs, path)
    keep = _keep_alike(served, options, specs) if pack is None else None
    params = place_params(served.model, served.config, checkpoint, served.partition, served.dtype, pack, keep)
    return _checked_alike(served, params, [spec.name for spec in specs], path)


def weights_of(served: Loaded, options: ModelOptions, tree: Params, workspace: int) -> Params:
    """The same from a tree of numpy or JAX arrays like that of param_specs, in float32, bfloat16 or float16.

    The arrays are copied: what becomes of them afterwards is the caller's business. Raises as `weights_at`, naming a
    leaf by its path in the tree.
    """
    specs, structure = jax.tree.flatten(specs_of(served.model, served.config), is_leaf=_is_spec)
    paths = [jax.tree_util.keystr(path) for path, _ in _with_paths(jax.tree.unflatten(structure, specs), _is_spec)]
    own = [
        replace(spec, name=f"{path}[*]" if _is_stack(leaf) else path, rows=None)
        for path, spec, leaf in zip(paths, specs, _leaves(served.params), strict=True)
    ]
    named = replace(
        served.model, param_specs=lambda config: jax.tree.unflatten(structure, own), unused=lambda name: False
    )
    pack = _pack_alike(served, options, own, GIVEN)
    given = _Given(own, _leaves(served.params), tree, raw=pack is None)
    _check_room(served, workspace)
    if pack is None:
        divide = partial(_spread, served.partition, served.dtype)
        keep = _keep_alike(served, options, own)
        params = load_params(
            named,
            served.config,
            given,
            dtype=served.dtype,
            device_put=lambda leaf, spec: leaf,
            divide=divide,
            keep=keep,
        )
    else:
        params = place_params(named, served.config, given, served.partition, served.dtype, pack, None)
    return _checked_alike(served, params, paths, GIVEN)


def edited(served: Loaded, options: ModelOptions, path: Path, workspace: int, *, reread: bool) -> Loaded:
    """The model as its file of code now says, with the weights that are served where its specs still say the same.

    Other specs want the weights of the checkpoint at `path`, if they may be read again (`reread`). Raises ConfigError
    with file and line, CheckpointError for specs that do not cover the checkpoint.
    """
    checkpoint, model, config = open_model(path, options.model_code)
    config = limited(config, options, served.embedding)
    partition = Partition(served.partition.mesh, model, config)
    packs = served.attention == "cpu"
    trace(model, config, served.dtype, stored_shapes(checkpoint, options, served.dtype, packs))
    was = jax.tree.flatten(specs_of(served.model, served.config), is_leaf=_is_spec)
    if jax.tree.flatten(specs_of(model, config), is_leaf=_is_spec) == was:
        params = served.params
    elif not reread:
        raise ConfigError("the edited code wants other weights than those that are served, which no checkpoint holds")
    else:
        _check_room(served, workspace)
        pack = packer(options, served.dtype, packs)
        keep = None if packs else keeper(options, partition, served.dtype)
        params = place_params(model, config, checkpoint, partition, served.dtype, pack, keep)
    return replace(served, model=model, config=config, partition=partition, params=params)


def _check_same_model(served: Loaded, options: ModelOptions, checkpoint: Checkpoint) -> None:
    """The compiled steps have the config in them."""
    if options.model_code is None:
        model, config = find_model(checkpoint.config)
        if model.name != served.model.name:
            raise ConfigError(f"{checkpoint.path} is a model of {model.name}; served is one of {served.model.name}")
    else:
        config = own_config(served.model, checkpoint.config)
    config, now = limited(config, options, served.embedding), served.config
    other = [f.name for f in fields(now) if getattr(config, f.name) != getattr(now, f.name)]
    if other:
        differences = ", ".join(f"{name} is {getattr(config, name)!r}, not {getattr(now, name)!r}" for name in other)
        raise ConfigError(
            f"{checkpoint.path} has another config than the model that is served: {differences}; start a server with it"
        )


def _check_room(served: Loaded, workspace: int) -> None:
    """Both weights are there until the switch."""
    leaves = jax.tree.leaves(served.params)
    if served.device.platform == "cpu":
        needed, free = bytes_per_device(leaves) * served.partition.mesh.size, host_memory().free
    else:
        stats = served.device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return
        needed, free = bytes_per_device(leaves), stats["bytes_limit"] - stats["bytes_in_use"] - workspace
    if needed > free:
        raise ConfigError(
            f"other weights need {needed / 2**30:.2f} GiB beside those that are served, until the switch, and "
            f"{max(free, 0) / 2**30:.2f} GiB are free; leave more with a lower --memory-utilization or --num-kv-pages"
        )


def _pack_alike(served: Loaded, options: ModelOptions, specs: list[ParamSpec], path: Path) -> Packer | None:
    """Lays matrices out as those that are served, in the same format."""
    pack = packer(options, served.dtype, served.attention == "cpu")
    if pack is None:
        return None
    leaves = {(spec.name, spec.rows): leaf for spec, leaf in zip(specs, _leaves(served.params), strict=True)}

    def alike(w: np.ndarray | Blocks, spec: ParamSpec) -> quant.Packed:
        now = leaves[spec.name, spec.rows]
        if not isinstance(now, quant.Packed):  # `_checked_alike` says what is wrong
            return pack(w, spec)
        if not isinstance(w, Blocks) and now.format is None:
            w = w.astype(now.panels.dtype, copy=False)
        packed = pack(w, spec)
        if packed.format != now.format:
            names = [found.format.name if found.format else "not quantised" for found in (packed, now)]
            raise CheckpointError(f"{path}: {spec.name} is {names[0]}, and in the weights that are served {names[1]}")
        return packed

    return alike


def _keep_alike(served: Loaded, options: ModelOptions, specs: list[ParamSpec]) -> Keeper:
    """Puts matrices on the devices quantised where those that are served are."""
    keep = keeper(options, served.partition, served.dtype)
    leaves = {(spec.name, spec.rows): leaf for spec, leaf in zip(specs, _leaves(served.params), strict=True)}

    def alike(matrix: Matrix, spec: ParamSpec) -> Scaled | jax.Array | None:
        quantised = options.quantization is not None or isinstance(leaves[spec.name, spec.rows], Scaled)
        return keep(matrix, spec) if quantised else None

    return alike


def _checked_alike(served: Loaded, params: Params, names: list[str], path: Path) -> Params:
    """The params, if the programs of those that are served take them."""
    for name, new, now in zip(names, _leaves(params), _leaves(served.params), strict=True):
        if _form(new) != _form(now):
            raise CheckpointError(
                f"{path}: {name} becomes {_about(new)} on its devices, and in the weights that are served it is "
                f"{_about(now)}"
            )
    return params


def _spread(partition: Partition, dtype: np.dtype, tensors: list[Any], spec: ParamSpec) -> jax.Array:
    """A leaf of the caller's on the devices of `partition`, a copy; from device to device where it lies on one."""
    if spec.spread:  # a stack that is served quantised, and cannot be so
        tensors, spec = [np.stack(tensors)], replace(spec, name="")
    (array,), to = tensors, partition.leaf(spec, dtype)
    # On a mesh of CPUs a transfer could meet a step's collectives, for which there are not enough threads.
    direct = partition.mesh.size == 1 or partition.mesh.devices.flat[0].platform != "cpu"
    if isinstance(array, jax.Array) and direct and to.shape == spec.shape:
        return jax.device_put(array.astype(dtype).reshape(spec.shape), to.sharding, may_alias=False)
    if partition.mesh.size > 1:
        return partition.put([np.asarray(array)], spec, dtype)
    return jax.device_put(np.array(array, dtype).reshape(spec.shape), to.sharding)


class _Given:
    """A tree of arrays as a Checkpoint, whose tensors are called by their paths in the tree."""

    path = GIVEN

    def __init__(self, specs: list[ParamSpec], leaves: list[Any], tree: Params, *, raw: bool):
        self.config: dict[str, Any] = {}
        self._raw = raw
        self._arrays: dict[str, Any] = {}
        self._stored: dict[str, tuple[int, ...]] = {}
        known = {spec.name.removesuffix("[*]"): (spec, leaf) for spec, leaf in zip(specs, leaves, strict=True)}
        for where, array in _with_paths(tree, lambda leaf: leaf is None):
            name = jax.tree_util.keystr(where)
            if not isinstance(array, np.ndarray | jax.Array):
                raise CheckpointError(f"{GIVEN}: {name} is a {type(array).__name__}, not an array of numpy or JAX")
            spec, leaf = known.get(name, (None, None))
            parts = {name: array}
            if spec is not None and spec.spread and array.shape:
                parts = {spec.name.replace("*", str(i)): one for i, one in enumerate(np.asarray(array))}
            for part, one in parts.items():
                self._arrays[part] = one
                # As a checkpoint would have it: [outputs, inputs] of a matrix that is laid out anew.
                if (
                    isinstance(leaf, quant.Packed | Scaled)
                    and spec is not None
                    and splits(one.shape, spec.tensor_shape)
                ):
                    self._stored[part] = (leaf.outputs, leaf.depth)
                else:
                    self._stored[part] = tuple(one.shape)

    def names(self) -> frozenset[str]:
        return frozenset(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._arrays[name].dtype)

    def read(self, name: str) -> Any:
        """The array itself if `raw`; else a view that nobody may write to, so that whoever keeps it copies it."""
        if self._raw and self._stored[name] == tuple(self._arrays[name].shape):
            return self._arrays[name]
        view = np.asarray(self._arrays[name]).reshape(self._stored[name]).view()
        view.flags.writeable = False
        return view

    def blocks(self, name: str) -> Blocks | None:
        return None

    def release(self, name: str) -> None:
        pass

    def nbytes(self, name: str) -> int:
        return int(self._arrays[name].nbytes)


def _leaves(tree: Any) -> list[Any]:
    """ParamSpecs or arrays, a matrix that is laid out anew being one."""
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, ParamSpec | quant.Packed | Scaled))


def _with_paths(tree: Any, is_leaf: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def _is_stack(leaf: Any) -> bool:
    return isinstance(leaf, quant.Packed | Scaled) and leaf.stacked


def _form(leaf: Any) -> tuple[Any, ...]:
    """What a program knows of a weight."""
    arrays, structure = jax.tree.flatten(leaf)
    return structure, [(a.shape, a.dtype, a.sharding) for a in arrays]


def _about(leaf: Any) -> str:
    return ", ".join(f"{list(a.shape)} of {a.dtype}" for a in jax.tree.leaves(leaf))
