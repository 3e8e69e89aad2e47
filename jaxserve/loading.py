"""Brings a model to its device as the options say: kernel, precision, layout of the weights. Knows no steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import attention, quant
from jaxserve.compile_cache import CompileCache
from jaxserve.config import DeviceOptions, ModelOptions
from jaxserve.dry_run import packed, trace
from jaxserve.errors import ConfigError
from jaxserve.formats import Blocks
from jaxserve.models import find_model
from jaxserve.spec import Model, Params, ParamSpec
from jaxserve.weights import Checkpoint, open_checkpoint
from jaxserve.weights.load import load_params
from kernels_pallas.ragged_paged_attention.contract import RaggedPagedAttention

type Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model whose weights are on their device, and what its steps are to be compiled with."""

    model: Model
    config: Any
    params: Params
    device: jax.Device
    dtype: np.dtype
    """Of the activations."""
    kv_dtype: np.dtype
    attention: str
    """The kernel's name."""
    kernel: RaggedPagedAttention
    programs: CompileCache


def load_model(options: ModelOptions, device: DeviceOptions, path: Path, progress: Progress) -> Loaded:
    """The model at `path`, a checkpoint directory or GGUF file. Sets up the compile cache, too.

    Raises ConfigError for options that the model or the machine does not serve, CheckpointError for damaged weights.
    """
    checkpoint = open_checkpoint(path)
    model, config = find_model(checkpoint.config, options.model_code)
    if options.max_model_len is not None and options.max_model_len < config.max_positions:
        config = replace(config, max_positions=options.max_model_len)  # which may decide how positions are embedded
    place = jax.local_devices()[0]
    name, reason, kernel = attention.choose(device.attention, place.platform, progress)
    progress(f"attention: {name} ({reason})")
    # What else than its config the programs of a foreign model file depend on, nobody knows.
    ours = options.model_code is None and model.forward.__module__.startswith("jaxserve.")
    programs = CompileCache(device.compile_cache_dir, whole=ours, progress=progress)
    dtype = jnp.dtype(dtype_for(options.dtype, place.platform))

    if options.model_code is not None:
        progress(f"model code: {options.model_code}")
        trace(model, config, dtype, _shapes(checkpoint, dtype, name == "cpu"))

    def report(done: int, total: int) -> None:
        progress(f"loading weights {100 * done // max(total, 1)} % of {total / 2**20:.0f} MiB")

    params = load_params(
        model,
        config,
        checkpoint,
        dtype=dtype,
        device_put=lambda leaf, spec: jax.device_put(leaf, place),
        pack=_packer(options, dtype, name == "cpu"),
        progress=report,
    )
    kv_dtype = _kv_dtype(options, device, name, params, dtype)
    return Loaded(model, config, params, place, dtype, kv_dtype, name, kernel, programs)


def _shapes(checkpoint: Checkpoint, dtype: np.dtype, packs: bool) -> Callable[[ParamSpec], Any]:
    """The shapes of the leaves that `load_params` will make."""

    def leaf(spec: ParamSpec) -> Any:
        first = spec.names[0]
        stored = checkpoint.shape(first) if spec.matrix and packs and first in checkpoint.names() else ()
        if len(stored) == 2:
            outputs = stored[0] if spec.rows is None else spec.rows[1] - spec.rows[0]
            return packed(spec, (outputs, stored[1]), dtype, dtype)
        return jax.ShapeDtypeStruct(spec.shape, dtype)

    return leaf


def _packer(
    options: ModelOptions, dtype: np.dtype, available: bool
) -> Callable[[np.ndarray | Blocks, ParamSpec], quant.Packed] | None:
    """Lays matrices out for the CPU kernels, if they are there; those multiply what is stored, cast only on demand."""
    if not available:
        if options.quantization is not None:
            raise ConfigError("quantization needs the CPU and its C++ kernels; leave it out, or see `jaxserve doctor`")
        return None

    def pack(w: np.ndarray | Blocks, spec: ParamSpec) -> quant.Packed:
        if options.quantization is not None and not spec.precise:
            if isinstance(w, Blocks):
                raise ConfigError(f"quantization: {spec.name} is {w.format.name} already; leave the option out")
            w = quant.quantised(w, options.quantization.upper(), vocabulary=spec.axes[0] == "vocab")
        if options.dtype != "auto" and not isinstance(w, Blocks):
            w = w.astype(dtype, copy=False)
        return quant.pack(w, spec.tensor_shape, dtype)

    return pack


def _kv_dtype(options: ModelOptions, device: DeviceOptions, kernel: str, params: Params, dtype: np.dtype) -> np.dtype:
    """The KV cache's type, `dtype` being the activations'. Raises ConfigError for one that the kernel does not read."""
    wanted = device.kv_cache_dtype
    if wanted == "auto":
        packed = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_packed) if _is_packed(leaf)]
        plain = options.dtype != "auto" or any(leaf.panels.dtype == jnp.float32 for leaf in packed)
        return dtype if plain or not packed else np.dtype(np.float16)
    if wanted == "int8":
        if kernel not in attention.READS_INT8:
            raise ConfigError(
                f"kv_cache_dtype int8 is not served by the attention kernel {kernel!r}; "
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
