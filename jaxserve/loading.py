"""Brings a model to its devices as the options say: kernel, precision, layout of the weights. Knows no steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve import attention, quant
from jaxserve.compile_cache import CompileCache
from jaxserve.config import DeviceOptions, MeshShape, ModelOptions
from jaxserve.dry_run import packed, specs_of, trace
from jaxserve.embedding import read_embedding
from jaxserve.errors import ConfigError
from jaxserve.formats import Blocks
from jaxserve.host_memory import give_back, host_memory, peak_memory
from jaxserve.model_code import load_model_code
from jaxserve.models import find_model, own_config
from jaxserve.request import EmbeddingInfo, TapInfo
from jaxserve.scaled import scaled_shapes
from jaxserve.sharding import Partition, bytes_per_device, meshes
from jaxserve.spec import Model, Params, ParamSpec
from jaxserve.taps import find_taps
from jaxserve.weights import Checkpoint, open_checkpoint, open_header
from jaxserve.weights.headless import as_stored
from jaxserve.weights.keep import Keeper, format_of, keeper, left_plain, only_plain, scaled_leaf
from jaxserve.weights.load import check_params, load_params
from kernels_pallas.ragged_paged_attention.contract import RaggedPagedAttention

type Progress = Callable[[str], None]
type Progressed = Callable[[int, int], None]
"""Called with the bytes that are done, and all."""
type Packer = Callable[[np.ndarray | Blocks, ParamSpec], quant.Packed]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a model will be computed with, before a weight is read."""

    model: Model
    config: Any
    """What config.json says, less the positions that are not served; weights have the sizes of `partition.config`."""
    max_positions: int
    """What config.json says of these."""
    partition: Partition
    dtype: np.dtype
    """Of the activations."""
    attention: str
    """The kernel's name."""
    kernel: RaggedPagedAttention
    embedding: EmbeddingInfo | None
    """How it makes embeddings; None: it generates."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Loaded(Chosen):
    """A model whose weights are on their devices, or their shapes only, and what its steps are to be compiled with."""

    params: Params
    kv_dtype: np.dtype
    programs: CompileCache
    taps: tuple[TapInfo, ...] = ()
    """Inner values that each step brings back."""

    @property
    def device(self) -> jax.Device:
        """The first of them that is this host's; all are of one kind."""
        return self.partition.mesh.local_devices[0]


def choose(
    options: ModelOptions,
    device: DeviceOptions,
    path: Path,
    hf: Mapping[str, Any],
    model: Model,
    config: Any,
    mesh: Mesh,
    platform: str,
    capability: str | None,
    progress: Progress,
) -> Chosen:
    """A model of a config.json `hf`, which lies at `path`, on `mesh`, whose devices may be only described, GPUs of a
    compute `capability`.

    Raises ConfigError for options that the model or the platform does not serve.
    """
    embedding = read_embedding(
        path, hf, causal=model.causal, width=config.width, task=options.task, pooling=options.pooling
    )
    positions, config = config.max_positions, limited(config, options, embedding)
    partition = Partition(mesh, model, config)
    dtype = jnp.dtype(dtype_for(options.dtype, platform))
    name, reason, kernel = attention.choose(
        device.attention, platform, progress, devices=mesh.size, causal=model.causal, block_size=device.block_size,
        kv_dtype=dtype if device.kv_dtype == "auto" else device.kv_dtype, head_dim=config.head_dim,
        value_dim=model.cache_spec(config).value_dim, capability=capability,
    )  # fmt: skip
    progress(f"attention: {name} ({reason})")
    return Chosen(model, config, positions, partition, dtype, name, kernel, embedding)


class Loading:
    """A model on its way to its devices: all that is known of it at once, and a thread that brings its weights.

    As a context manager it gives the weights up when the body fails.
    """

    def __init__(self, outline: Loaded, memory: int | None, read: Callable[[Callable[[], None]], Params] | None):
        self.outline = outline
        """The model with the shapes of its weights, and where they will lie: what its steps can be compiled with."""
        self.memory = memory
        """Bytes that each of its devices has, the weights' own counted. None: the device does not say."""
        self._given_up = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._params = None if read is None else self._pool.submit(read, self._check)
        self._pool.shutdown(wait=False)

    def result(self) -> Loaded:
        """The model when its weights are there; its outline if it is to be compiled only. Raises CheckpointError."""
        if self._params is None:
            return self.outline
        params = self._params.result()
        known, found = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (self.outline.params, params))
        assert known == found, "weights are not of the shapes that the steps are compiled for"
        return replace(self.outline, params=params)

    def give_up(self) -> None:
        """Ends the thread, after the tensors that it is at."""
        self._given_up = True
        self._pool.shutdown(wait=True)

    def __enter__(self) -> "Loading":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.give_up()

    def _check(self) -> None:
        if self._given_up:
            raise CancelledError


def load_model(options: ModelOptions, device: DeviceOptions, path: Path, progress: Progress) -> Loaded:
    """The result of `start_loading` on the options' mesh. Raises as it, and CheckpointError for damaged weights."""
    return start_loading(options, device, path, progress).result()


def start_loading(
    options: ModelOptions,
    device: DeviceOptions,
    path: Path,
    progress: Progress,
    mesh: Mesh | None = None,
    capture: Sequence[str] = (),
    *,
    ahead: bool = False,
) -> Loading:
    """The model at `path`, a checkpoint directory or GGUF file, on `mesh`, or on that of the options.

    `capture`: patterns of inner values that its steps are to bring back. Sets up the compile cache, too. With `ahead`
    it is to be compiled only: no weight is read, and programs that cannot be kept are an error. `progress` is called by
    other threads, too. Raises ConfigError for options that the model or the machine does not serve, CheckpointError for
    weights that are not the model's.
    """
    checkpoint, model, config = open_model(path, options.model_code, ahead=ahead)
    shape = MeshShape.parse(device.mesh or "1")
    mesh = mesh or _only_mesh(shape)
    place = mesh.devices.flat[0]
    capability = getattr(place, "compute_capability", None)
    chosen = choose(options, device, path, checkpoint.config, model, config, mesh, place.platform, capability, progress)
    config, partition, dtype = chosen.config, chosen.partition, chosen.dtype
    # What else than its config the programs of a foreign model file depend on, nobody knows.
    ours = options.model_code is None and model.forward.__module__.startswith("jaxserve.")
    programs = CompileCache(device.compile_cache_dir, whole=ours, progress=progress, must_keep=ahead)

    packs = chosen.attention == "cpu"
    if options.model_code is not None:
        progress(f"model code: {options.model_code}")
        trace(model, config, dtype, stored_shapes(checkpoint, options, dtype, packs))
    taps = _taps(model, config, partition, dtype, chosen.embedding, capture) if capture else ()
    pack = packer(options, dtype, packs)
    keep = None if packs else keeper(options, partition, dtype)
    shapes = _param_shapes(model, config, checkpoint, partition, options, dtype, packs=packs)
    if not packs:
        _check_fit(partition, jax.tree.leaves(shapes), dtype, device, shape)
    memory = device_memory(mesh.local_devices[0], shape.data * len(mesh.local_devices))
    kv_dtype = kv_dtype_for(options, device, chosen.attention, shapes, dtype)
    outline = Loaded(**vars(chosen), params=shapes, kv_dtype=kv_dtype, programs=programs, taps=taps)

    def read(check: Callable[[], None]) -> Params:
        start, size, said = time.perf_counter(), 0, -1

        def report(done: int, total: int) -> None:
            nonlocal size, said
            check()
            size, percent = total, 100 * done // max(total, 1)
            if percent > said:
                said = percent
                progress(f"loading weights {percent} % of {total / 2**20:.0f} MiB")

        params = place_params(model, config, checkpoint, partition, dtype, pack, keep, report)
        give_back()
        seconds = time.perf_counter() - start
        if plain := 0 if packs else left_plain(checkpoint, _specs(model, config), params, options):
            progress(
                f"{plain} matrices become plain numbers here instead of quantised ones: rows that blocks do not fill, "
                "or groups of inputs that the mesh would cut"
            )
        found = f"{size / 1e6:.1f} MB read in {seconds:.1f} s"
        if len(mesh.local_devices) < mesh.size:  # it is the shards of those that were read
            found = f"this host's part of {found}"
        else:
            found += f", {size / 1e9 / seconds:.2f} GB/s"
        progress(f"weights: {found}; most memory that this process has had: {peak_memory() / 1e6:.0f} MB")
        return params

    return Loading(outline, memory, None if ahead else read)


def open_model(path: Path, code: str | None, *, ahead: bool = False) -> tuple[Checkpoint, Model, Any]:
    """The checkpoint at `path`, its model, which is that of the file `code` if there is one, and the model's config.

    With `ahead` it may lack weights. Raises as open_checkpoint and find_model.
    """
    checkpoint = open_header(path) if ahead else open_checkpoint(path)
    if code is None:
        return checkpoint, *find_model(checkpoint.config)
    model = load_model_code(code)
    checkpoint = named_for(model, checkpoint)
    return checkpoint, model, own_config(model, checkpoint.config)


def named_for(model: Model, checkpoint: Checkpoint) -> Checkpoint:
    """One without output matrix under the names that a model of somebody's own gives, which may be those it has."""
    stored = as_stored(checkpoint)
    if stored is checkpoint:
        return checkpoint
    specs = jax.tree.leaves(
        specs_of(model, own_config(model, stored.config)), is_leaf=lambda s: isinstance(s, ParamSpec)
    )
    return stored if any(name in stored.names() for spec in specs for name in spec.names) else checkpoint


def _taps(
    model: Model,
    config: Any,
    partition: Partition,
    dtype: np.dtype,
    embedding: EmbeddingInfo | None,
    patterns: Sequence[str],
) -> tuple[TapInfo, ...]:
    if embedding is not None:
        raise ConfigError("capture is served of models that generate, and this one gives embeddings; leave it out")
    taps = find_taps(model, config, dtype, patterns)
    for tap, there in zip(taps, find_taps(model, partition.config, dtype, patterns), strict=True):
        if tap != there:
            raise ConfigError(
                f"capture {tap.name!r}: {list(tap.shape)} a token would be filled up to {list(there.shape)} to be "
                f"divided over {partition.mesh.size} devices; take a --mesh that divides it evenly"
            )
    return taps


def limited(config: Any, options: ModelOptions, embedding: EmbeddingInfo | None) -> Any:
    """A model's config with the positions that the options leave it, which may decide how positions are embedded.

    Where these do not say, an embedding model's files may.
    """
    longest = options.max_model_len or (embedding.longest if embedding is not None else None)
    if longest is not None and longest < config.max_positions:
        return replace(config, max_positions=longest)
    return config


def place_params(
    model: Model,
    config: Any,
    checkpoint: Checkpoint,
    partition: Partition,
    dtype: np.dtype,
    pack: Packer | None,
    keep: Keeper | None,
    progress: Progressed | None = None,
) -> Params:
    """`load_params` onto the devices of `partition`."""
    device = partition.mesh.devices.flat[0]
    return load_params(
        model,
        config,
        checkpoint,
        dtype=dtype,
        device_put=lambda leaf, spec: jax.device_put(leaf, device),
        divide=partial(partition.put, dtype=dtype) if partition.mesh.size > 1 else None,
        pack=pack,
        keep=keep,
        progress=progress,
    )


def _only_mesh(shape: MeshShape) -> Mesh:
    if shape.data > 1:
        raise ConfigError(f"mesh {shape}: this runs one replica only; give {replace(shape, data=1)}")
    return meshes(shape, jax.local_devices())[0]


def _check_fit(partition: Partition, leaves: Any, dtype: np.dtype, options: DeviceOptions, shape: MeshShape) -> None:
    """Raises ConfigError for weights, all but those for the CPU's kernels, that are more than their devices' memory."""
    device = partition.mesh.local_devices[0]
    total = device_memory(device, shape.data * len(partition.mesh.local_devices))
    weights = bytes_per_device(leaves)
    share = 1.0 if options.num_kv_pages else memory_share(options, device.platform)
    if total is not None and weights > total * share:
        raise ConfigError(
            f"weights of {weights / 2**30:.2f} GiB a device, {dtype.name}, do not fit: {share:.0%} of its "
            f"{total / 2**30:.2f} GiB may be used; divide the model over more devices than {partition.mesh.size} "
            "(--mesh), or raise --memory-utilization"
        )


def device_memory(device: jax.Device, sharers: int) -> int | None:
    """Bytes that a device has; on CPU its part of those that are free, of `sharers` devices. None: it does not say."""
    if device.platform == "cpu":
        return host_memory().free // sharers
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def memory_share(options: DeviceOptions, platform: str) -> float:
    """The share of a device's memory that may be used."""
    return options.memory_utilization or (0.5 if platform == "cpu" else 0.9)


def stored_shapes(
    checkpoint: Checkpoint, options: ModelOptions, dtype: np.dtype, packs: bool
) -> Callable[[ParamSpec], Any]:
    """The shapes of the leaves that `load_params` will make; `packs`: matrices are laid out for the CPU's kernels."""

    def leaf(spec: ParamSpec) -> Any:
        first = spec.names[0]
        stored = checkpoint.shape(first) if spec.matrix and first in checkpoint.names() else ()
        if len(stored) != 2:
            return jax.ShapeDtypeStruct(spec.shape, dtype)
        outputs = stored[0] if spec.rows is None else spec.rows[1] - spec.rows[0]
        format = format_of(checkpoint, options, spec, stored[1], packs=packs)
        if not packs:
            if format is None:
                return jax.ShapeDtypeStruct(spec.shape, dtype)
            vocabulary = spec.axes[0] == "vocab"
            return scaled_shapes(
                format, spec.shape, outputs, stored[1], dtype, vocabulary=vocabulary, stacked=spec.spread
            )
        plain = checkpoint.dtype(first) if options.dtype == "auto" else dtype
        return packed(spec, (outputs, stored[1]), format or plain, dtype)

    return leaf


def _param_shapes(
    model: Model,
    config: Any,
    checkpoint: Checkpoint,
    partition: Partition,
    options: ModelOptions,
    dtype: np.dtype,
    *,
    packs: bool,
) -> Params:
    """What `place_params` would make, as shapes with the places where they lie."""
    if not checkpoint.names() and packs:
        raise ConfigError(
            f"{checkpoint.path} holds no weights, and the CPU's kernels multiply them in the types that they are "
            "stored in; give the whole checkpoint (its headers are read), or --attention reference"
        )
    if checkpoint.names():
        check_params(model, config, checkpoint)
    if not packs:
        leaf = scaled_leaf(checkpoint, options, partition, dtype)
        return jax.tree.map(leaf, model.param_specs(config), is_leaf=_is_spec)
    shapes = jax.tree.map(stored_shapes(checkpoint, options, dtype, packs), model.param_specs(config), is_leaf=_is_spec)
    place = partition.everywhere
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)


def _specs(model: Model, config: Any) -> list[ParamSpec]:
    found: list[ParamSpec] = jax.tree.leaves(model.param_specs(config), is_leaf=_is_spec)
    return found


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def packer(options: ModelOptions, dtype: np.dtype, available: bool) -> Packer | None:
    """Lays matrices out for the CPU kernels, if they are there; those multiply what is stored, cast only on demand."""
    if not available:
        return None

    def pack(w: np.ndarray | Blocks, spec: ParamSpec) -> quant.Packed:
        if options.quantization is not None and not spec.precise:
            w = quant.quantised(only_plain(w, spec), options.quantization.upper(), vocabulary=spec.axes[0] == "vocab")
        if options.dtype != "auto" and not isinstance(w, Blocks):
            w = w.astype(dtype, copy=False)
        return quant.pack(w, spec.tensor_shape, dtype)

    return pack


def kv_dtype_for(
    options: ModelOptions, device: DeviceOptions, kernel: str, params: Params, dtype: np.dtype
) -> np.dtype:
    """The KV cache's type, `dtype` being the activations'. Raises ConfigError for one that the kernel does not read."""
    wanted = device.kv_dtype
    if wanted == "auto":
        packed = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_packed) if _is_packed(leaf)]
        wide = bytes_per_device([leaf.panels for leaf in packed if leaf.panels.dtype == jnp.float32])
        # More than the routers, which are float32 in quantised files too.
        plain = options.dtype != "auto" or 2 * wide >= bytes_per_device([leaf.panels for leaf in packed])
        return dtype if plain else np.dtype(np.float16)
    if jnp.dtype(wanted).itemsize == 1:
        if not attention.reads(kernel, wanted):
            raise ConfigError(
                f"kv_cache_dtype {wanted} is not served by the attention kernel {kernel!r}; "
                f"give --attention reference, or --kv-cache-dtype {dtype.name}"
            )
    elif jnp.dtype(wanted) != dtype and kernel != "cpu":
        raise ConfigError(
            f"kv_cache_dtype {wanted} with {dtype.name} activations needs the CPU's kernels, not {kernel!r}; "
            f"give --kv-cache-dtype {dtype.name} or auto"
        )
    return jnp.dtype(wanted)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, quant.Packed)


def dtype_for(option: str, platform: str) -> str:
    """The name of the dtype of weights and cache."""
    if option == "auto":  # XLA:CPU reads bfloat16 weights 20 times below memory bandwidth at batch 1
        return "float32" if platform == "cpu" else "bfloat16"
    return option
