"""Traces a model file on shapes alone, and says where it does not fit what it declares. No weight, no device.

T tokens of the step, S sampled rows, D width, N query heads, K kv heads, H head_dim, V vocab
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxserve import quant
from jaxserve.errors import ConfigError
from jaxserve.formats import Format
from jaxserve.model_code import brief, place
from jaxserve.native import blocks
from jaxserve.native.linear import panels_shape
from jaxserve.spec import Model, ModelConfig, Params, ParamSpec

SIZES = tuple(name for name in vars(ModelConfig) if not name.startswith("_"))
"""The sizes that every config has."""
TOKENS = 13
"""T of the trace: unlike most sizes of a model, so that no axis is taken for another."""
ROWS = 3
_OPTIONS = ("scale", "window", "soft_cap", "sinks", "causal", "value_dim")


@dataclass(frozen=True)
class Traced:
    """What a forward did, as far as shapes tell."""

    attended: tuple[int | None, ...]
    """The layer of each call of attend, in order; None where it is no number but a traced value."""
    jaxpr: Any
    """forward and logits as JAX sees them."""


def trace(model: Model, config: Any, dtype: Any, leaf: Callable[[ParamSpec], Any] | None = None) -> Traced:
    """Runs forward and logits on shapes, with activations and weights of `dtype`.

    `leaf` gives the shapes of a weight as it will lie on the device; without it all are plain arrays.
    Raises ConfigError with file and line for a size that the config lacks, for specs that are none, for whatever the
    model raises, and for q, k, v, hidden states, cache or logits of another shape or type than declared.
    """
    check_sizes(model, config)
    dtype = jnp.dtype(dtype)
    params = jax.tree.map(
        leaf or (lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype)), specs_of(model, config), is_leaf=_is_spec
    )
    spec = model.cache_spec(config)
    attended: list[int | None] = []

    def attend(layer: Any, q: Any, k: Any, v: Any, cache: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        number = int(layer) if isinstance(layer, int | np.integer) else None
        attended.append(number)
        what = f"attend of layer {layer}" if number is not None else "attend"
        if number is not None and not 0 <= number < spec.layers:
            raise _Misfit(f"attend is called with layer {layer}; the config has layers 0 to {spec.layers - 1}")
        heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
        if options.get("value_dim") != spec.value_dim:
            raise _Misfit(
                f"{what} has value_dim={options.get('value_dim')}; the config's is {spec.value_dim}, as the cache is"
            )
        if spec.value_dim is not None and v is not None:
            raise _Misfit(f"{what}: v is {_about(v)}; a latent's values are a part of k, and v is None")
        for name, x in (("q", q), ("k", k), *([("v", v)] if spec.value_dim is None else [])):
            kind = "heads" if name == "q" else "kv_heads"
            _fits(f"{what}: {name}", x, ("T", kind, "head_dim"), (TOKENS, heads[name], config.head_dim), dtype)
        if getattr(cache, "shape", None) != state.shape:
            raise _Misfit(f"{what}: the cache is {_about(cache)}; hand on the one that came with the step")
        if unknown := options.keys() - {*_OPTIONS}:
            raise _Misfit(f"{what} has no option {min(unknown)!r}; it has {', '.join(_OPTIONS)}")
        if options.get("causal", True) is not model.causal:
            raise _Misfit(f"{what}: causal must be {model.causal}; a file of an encoder says CAUSAL = False")
        kept, window = spec.windows[number] if spec.windows and number is not None else None, options.get("window")
        if kept is not None and (window is None or window > kept):
            raise _Misfit(f"{what} has window={window}; the config's windows say {kept}, and no more tokens are kept")
        return q[..., : spec.value_dim], cache

    state = jax.ShapeDtypeStruct((spec.layers, 1, spec.row), jnp.float32)
    row = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)

    def run(params: Params, tokens: Any, positions: Any, cache: Any) -> Any:
        out = model.forward(params, config, tokens, positions, cache, attend)
        if not isinstance(out, tuple) or len(out) != 2:
            raise _Misfit(f"forward returns {_about(out)}, not (hidden, cache)")
        hidden, cache = out
        _fits("forward's hidden", hidden, ("T", "width"), (TOKENS, config.width), dtype)
        _fits("forward's cache", cache, ("layers", "1", "row"), state.shape, state.dtype)
        if not model.causal:
            return hidden, cache
        logits = model.logits(params, config, hidden[:ROWS])
        _fits("logits", logits, ("S", "vocab"), (ROWS, config.vocab), jnp.dtype(jnp.float32))
        return logits, cache

    try:
        jaxpr = jax.make_jaxpr(run)(params, row, row, state)
    except _Misfit as error:
        raise ConfigError(f"{place(error) or _start(model)}{error}") from error
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{place(error)}{brief(error)}{_cure(error)}") from error
    return Traced(tuple(attended), jaxpr)


def check_sizes(model: Model, config: Any) -> None:
    """Raises ConfigError unless the config has every size that the engine reads, each a whole number above 0."""
    kind = type(config).__name__
    for name in SIZES:
        if not hasattr(config, name):
            raise ConfigError(f"{model.name}: {kind} lacks the size {name!r}; needed are {', '.join(SIZES)}")
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{model.name}: {kind}.{name} is {value!r}, not a whole number above 0")
    if config.heads % config.kv_heads:
        raise ConfigError(f"{model.name}: {kind}.heads is {config.heads}, not a multiple of kv_heads {config.kv_heads}")


def specs_of(model: Model, config: Any) -> Any:
    """param_specs(config). Raises ConfigError with file and line, or with the path of a leaf that is no ParamSpec."""
    try:
        specs = model.param_specs(config)
    except Exception as error:
        raise ConfigError(f"{place(error)}{brief(error)}") from error
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec)
    if not leaves:
        raise ConfigError(f"{_start(model)}param_specs returns no ParamSpec at all, but {_about(specs)}")
    for path, leaf in leaves:
        at = f"{_start(model)}param_specs(config){jax.tree_util.keystr(path)}"
        if not isinstance(leaf, ParamSpec):
            raise ConfigError(
                f"{at} is {_about(leaf)}, not a ParamSpec; make it with weight() or matrix() of jaxserve.spec"
            )
        if len(leaf.axes) != len(leaf.shape) or not all(isinstance(n, int) and n > 0 for n in leaf.shape):
            sizes = ", ".join(f"{a} {n!r}" for a, n in zip(leaf.axes, leaf.shape, strict=False))
            raise ConfigError(f"{at} ({leaf.name}): every axis needs a size above 0; they are {sizes or 'none'}")
    return specs


def packed(spec: ParamSpec, stored: tuple[int, ...], kind: DTypeLike | Format, dtype: Any) -> quant.Packed:
    """The shapes of a matrix that is stored as [outputs, inputs], or of a stack, when the CPU's kernels have it.

    `kind`: the type of its numbers, or their block format.
    """
    count, outputs, depth = (len(spec.names),) if spec.spread else (), stored[0], math.prod(stored[1:])
    format = kind if isinstance(kind, Format) else None
    if isinstance(kind, Format):
        own: tuple[int, ...] = (blocks.panel_bytes(kind, outputs, depth),)
        kind = np.uint8
    else:
        own = panels_shape(outputs, depth, kind)
    panels: Any = jax.ShapeDtypeStruct((*count, *own), kind)  # a tree of them is a tree of arrays to whoever traces
    return quant.Packed(panels, spec.shape, outputs, np.dtype(dtype), format, stacked=spec.spread)


class _Misfit(Exception):
    pass


def _fits(what: str, x: Any, axes: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype) -> None:
    declared = f"[{', '.join(axes)}] = {list(shape)}"
    if not hasattr(x, "shape") or len(x.shape) != len(shape):
        raise _Misfit(f"{what} is {_about(x)}; the config says {declared}")
    for i, (found, size) in enumerate(zip(x.shape, shape, strict=True)):
        if found != size:
            raise _Misfit(f"{what} is {list(x.shape)}; the config says {declared}: axis {i}, {axes[i]}, is {found}")
    if x.dtype != dtype:
        raise _Misfit(f"{what} is {x.dtype}; it must be {dtype}{_DTYPE_CURES.get(what, _PROMOTED)}")


_PROMOTED = ", as the weights and the activations before it are: something promoted it, say a float32 array"
_DTYPE_CURES = {
    "logits": ": multiply by linear_f32 of jaxserve.quant, or end with .astype(jnp.float32)",
    "forward's cache": ": return the one that the last attend returned",
}


def _cure(error: Exception) -> str:
    if "Packed" in str(error) or "Scaled" in str(error):
        return (
            "; a weight that is declared with matrix() is laid out anew, or quantised, and only linear, linear_f32 and "
            "embed of jaxserve.quant may touch it: use them, or declare it with weight()"
        )
    if isinstance(error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError):
        return "; a step is compiled once for all values: use jnp.where or jax.lax.cond for what depends on a value"
    return ""


def _about(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{list(x.shape)} of {x.dtype}"
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, tuple | list | dict) else "")


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def _start(model: Model) -> str:
    return f"{model.name}: "
