"""What a model file may assume: how it names its weights, its cache and its attention. No engine, no mesh.

A model is a module with `Config.from_hf(dict)`, `param_specs(config)`, `forward(...)` and `logits(...)`;
`Model` is that module seen as a type.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jaxserve.errors import ConfigError
from kernels_pallas.ragged_paged_attention.contract import Cache

type Params = Any
"""The tree of arrays that mirrors the tree of ParamSpecs."""


@dataclass(frozen=True)
class ParamSpec:
    """One weight: its logical axes, their sizes, and its name in a Hugging Face checkpoint.

    Matrices keep the checkpoint's layout, outputs first, so loading is a view and never a transpose.
    `shape` may split a checkpoint axis (`heads head_dim` of one row axis); the sizes only have to multiply up.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    name: str
    matrix: bool = False
    """Only `linear`, `linear_f32` and `embed` touch it: it may be kept in another layout, or quantised."""


def weight(config: Any, axes: str, name: str) -> ParamSpec:
    """A ParamSpec whose axis names are the config's field names, so shape and sharding cannot disagree.

    `weight(c, "width", "model.layers.0.input_layernorm.weight")`
    """
    return ParamSpec(*_sized(config, axes, name), name)


def matrix(config: Any, axes: str, name: str) -> ParamSpec:
    """The same for a weight [outputs, inputs] that nothing but `linear`, `linear_f32` and `embed` of quant.py touches.

    `matrix(c, "heads head_dim width", "model.layers.0.self_attn.q_proj.weight")`
    """
    return ParamSpec(*_sized(config, axes, name), name, matrix=True)


def _sized(config: Any, axes: str, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = tuple(axes.split())
    missing = [a for a in names if not hasattr(config, a)]
    if missing:
        raise ConfigError(f"{name}: no size for axis {missing[0]!r} in {type(config).__name__}")
    return names, tuple(getattr(config, a) for a in names)


def only_served(hf: Mapping[str, Any], **served: Any) -> None:
    """Raises ConfigError when a checkpoint's config.json asks for what a model file does not compute."""
    for key, value in served.items():
        if hf.get(key, value) not in (value, None):
            raise ConfigError(f"config.json has {key}={hf[key]!r}; this model file serves {value!r} only")


def cap_of(hf: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    """A soft cap, for which config.json may say null: none. Raises ConfigError for one that is not above 0."""
    cap = hf.get(key, default)
    if cap is not None and not cap > 0:
        raise ConfigError(f"config.json has {key}={cap!r}; a soft cap must be above 0, or null for none")
    return cap


def layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The sliding window of each layer by Qwen's keys: layer_types where given, else all from max_window_layers up."""
    layers = hf["num_hidden_layers"]
    if not hf.get("use_sliding_window", False):
        return (None,) * layers
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(hf.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in kinds)


def sliding_layers(hf: Mapping[str, Any], pattern: int) -> tuple[bool, ...]:
    """Which layers see a sliding window only: by layer_types where given, else all but every `pattern`-th.

    Raises ConfigError for layer_types of another length, or of kinds that are not served.
    """
    layers = hf["num_hidden_layers"]
    names = {"sliding_attention": True, "full_attention": False}
    kinds = hf.get("layer_types") or [list(names)[(i + 1) % pattern == 0] for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= set(names):
        raise ConfigError(f"config.json has layer_types={kinds!r}; served are {layers} of {', '.join(names)}")
    return tuple(names[kind] for kind in kinds)


@dataclass(frozen=True)
class CacheSpec:
    """The paged KV cache a model needs: one row a token and layer, `[k0|v0|k1|v1|...]`."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def row(self) -> int:
        """Elements a token and layer."""
        return self.kv_heads * 2 * self.head_dim


@runtime_checkable
class Attend(Protocol):
    """Attention as a model sees it: writes k and v of this step into the cache, then reads.

    Every token attends to itself and its past; with `window` to the last `window` positions, itself included.
    `scale` multiplies the scores (default head_dim ** -0.5), `soft_cap` bounds them by cap * tanh(score / cap), and
    `sinks` are logits, one a query head, that take a share of the weights and have no value.
    """

    def __call__(
        self,
        layer: int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: Cache,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Float[Array, " N"] | None = None,
    ) -> tuple[Float[Array, "T N H"], Cache]: ...


class ModelConfig(Protocol):
    """The sizes that the engine reads of every model's config."""

    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


@dataclass(frozen=True)
class Model:
    """A model module's four functions, and the name it is known by."""

    name: str
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    param_specs: Callable[[Any], Any]
    forward: Callable[..., tuple[Float[Array, "T D"], Cache]]
    """forward(params, config, tokens [T], positions [T], cache, attend) -> hidden [T, D], cache"""
    logits: Callable[[Params, Any, Float[Array, "S D"]], Float[Array, "S V"]]
    """logits(params, config, hidden [S, D]) -> float32 [S, V]"""

    @classmethod
    def of(cls, module: Any) -> "Model":
        """The Model of a module. Raises ConfigError naming what the module lacks."""
        lacks = [n for n in ("Config", "param_specs", "forward", "logits") if not hasattr(module, n)]
        if lacks:
            raise ConfigError(f"model file {module.__name__} lacks {', '.join(lacks)}")
        return cls(
            module.__name__.rsplit(".", 1)[-1],
            module.Config.from_hf,
            module.param_specs,
            module.forward,
            module.logits,
        )

    def cache_spec(self, config: ModelConfig) -> CacheSpec:
        """The cache of a model whose layers all keep their keys and values."""
        return CacheSpec(config.layers, config.kv_heads, config.head_dim)
