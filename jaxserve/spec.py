"""What a model file may assume: how it names its weights, its cache and its attention. No engine, no mesh.

A model is a module with `Config.from_hf(dict)`, `param_specs(config)`, `forward(...)` and `logits(...)`; it may have
`unused(name)` and `EXAMPLE` as well. With `CAUSAL = False` it is an encoder, which has no logits: embeddings are made
of its hidden states. `Model` is that module seen as a type.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jaxserve.errors import ConfigError
from jaxserve.page_groups import PageGroups
from kernels_pallas.ragged_paged_attention.contract import Cache, latent_row

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
    """With a `*` where as many tensors as the first axis is long have their number in it."""
    matrix: bool = False
    """Only the products of quant.py and its `embed` touch it: it may be kept in another layout, or quantised."""
    rows: tuple[int, int] | None = None
    """Which rows of the checkpoint's tensor it is, [begin, end), where that holds several weights; None: all."""
    together: bool = False
    """A norm takes the mean over all its axes at once: zeros that fill one up for a mesh would change what it gives."""
    precise: bool = False
    """Few numbers of which every digit counts: quantised only if the checkpoint says so."""

    @property
    def spread(self) -> bool:
        """Whether it is several tensors of the checkpoint."""
        return "*" in self.name

    @property
    def names(self) -> tuple[str, ...]:
        """Of those tensors, in their order."""
        return tuple(self.name.replace("*", str(i)) for i in range(self.shape[0])) if self.spread else (self.name,)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of them."""
        return self.shape[1:] if self.spread else self.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that each most likely has in a checkpoint: of a matrix [outputs, inputs], where the width is one of
        the two."""
        shape = self.tensor_shape
        if not self.matrix or len(shape) < 3:
            return shape
        outputs = 1 if self.axes[-len(shape)] == "width" else len(shape) - 1
        return math.prod(shape[:outputs]), math.prod(shape[outputs:])


def weight(config: Any, axes: str, name: str, *, together: bool = False) -> ParamSpec:
    """A ParamSpec whose axis names are the config's field names, so shape and sharding cannot disagree.

    `weight(c, "width", "model.layers.0.input_layernorm.weight")`
    """
    return ParamSpec(*_sized(config, axes, name), name, together=together)


def matrix(config: Any, axes: str, name: str, *, precise: bool = False) -> ParamSpec:
    """The same for a weight [outputs, inputs] that nothing but the products of quant.py and its `embed` touch.

    `matrix(c, "heads head_dim width", "model.layers.0.self_attn.q_proj.weight")`, and for experts, which are tensors of
    their own, `matrix(c, "experts expert_ffn width", "model.layers.0.mlp.experts.*.up_proj.weight")`
    """
    return ParamSpec(*_sized(config, axes, name), name, matrix=True, precise=precise)


def stacked(config: Any, name: str, **parts: str) -> dict[str, ParamSpec]:
    """Matrices, by name and axes, that lie one below the other in one tensor [outputs of all, inputs] of a checkpoint.

    `stacked(c, "model.layers.0.mlp.gate_up_proj.weight", gate="ffn width", up="ffn width")`
    """
    specs, begin = {}, 0
    for part, names in parts.items():
        axes, shape = _sized(config, names, name)
        end = begin + math.prod(shape[:-1])
        specs[part] = ParamSpec(axes, shape, name, matrix=True, rows=(begin, end))
        begin = end
    return specs


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


def expert_counts(hf: Mapping[str, Any]) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token goes through.

    Raises ConfigError for more of the latter, or for none.
    """
    key = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in hf), "num_experts")
    experts, used = hf[key], hf["num_experts_per_tok"]
    if not 0 < used <= experts:
        raise ConfigError(
            f"config.json has {key}={experts!r} and num_experts_per_tok={used!r}; served is 1 up to {key}"
        )
    return experts, used


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
    """The paged KV cache a model needs: one row a token and layer, `[k0|v0|k1|v1|...]`, or one latent."""

    layers: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = ()
    """How many tokens each layer sees, the token itself included; None: all. Empty: all layers see all."""
    value_dim: int | None = None
    """Of latents: how many numbers of a key, the first ones, are its values; None: keys have values of their own."""

    def groups(self, length: int) -> PageGroups:
        """The layers by what they keep of sequences of up to `length` tokens."""
        return PageGroups.of(self.windows or (None,) * self.layers, length)

    @property
    def row(self) -> int:
        """Elements a token and layer."""
        return self.kv_heads * 2 * self.head_dim if self.value_dim is None else latent_row(self.head_dim)


@runtime_checkable
class Attend(Protocol):
    """Attention as a model sees it: writes k and v of this step into the cache, then reads.

    Every token attends to itself and its past; with `window` to the last `window` positions, itself included; where
    `causal` is False, as encoders have it, to all of its sequence, which must be in this step whole.
    `scale` multiplies the scores (default head_dim ** -0.5), `soft_cap` bounds them by cap * tanh(score / cap), and
    `sinks` are logits, one a query head, that take a share of the weights and have no value.
    Latents have one kv head and no v: their first `value_dim` numbers are their values, and the result's V is that.
    """

    def __call__(
        self,
        layer: int,
        q: Float[Array, "T N H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"] | None,
        cache: Cache,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Float[Array, " N"] | None = None,
        causal: bool = True,
        value_dim: int | None = None,
    ) -> tuple[Float[Array, "T N V"], Cache]: ...


class ModelConfig(Protocol):
    """The sizes that the engine reads of every model's config.

    One whose layers have sliding windows may say so in `windows`, a tuple of one window a layer, None for none: then
    such a layer keeps of a sequence only the pages that its window needs, and `attend` refuses a wider one.
    One whose cache is of latents says in `value_dim` how many numbers of a key are its values; it has one kv head.
    """

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
    """forward(params, config, tokens [T], positions [T], cache, attend) -> hidden [T, D], cache

    A token of -1 is nobody's: it fills the step up, and what becomes of it does not matter."""
    logits: Callable[[Params, Any, Float[Array, "S D"]], Float[Array, "S V"]]
    """logits(params, config, hidden [S, D]) -> float32 [S, V]"""

    unused: Callable[[str], bool] = lambda name: False
    """unused(tensor name) -> whether a checkpoint may hold this tensor although no spec names it: a mask, say."""
    example: Mapping[str, Any] | None = None
    """A config.json of few and small layers, for `jaxserve check` to compute with."""
    causal: bool = True
    """Otherwise an encoder: it takes prompts whole, and nothing of them stays in the cache."""

    @classmethod
    def of(cls, module: Any, name: str | None = None) -> "Model":
        """The Model of a module, or of any object that has what a model file has. Raises ConfigError for a lack."""
        name = name or module.__name__.rsplit(".", 1)[-1]
        causal = getattr(module, "CAUSAL", True)
        needed = ("Config", "param_specs", "forward", *(("logits",) if causal else ()))
        lacks = [n for n in needed if not hasattr(module, n)]
        if not lacks and not hasattr(module.Config, "from_hf"):
            lacks = ["Config.from_hf"]
        if lacks:
            raise ConfigError(f"model file {name} lacks {', '.join(lacks)}")
        return cls(
            name,
            module.Config.from_hf,
            module.param_specs,
            module.forward,
            module.logits if causal else _no_logits,
            getattr(module, "unused", cls.unused),
            getattr(module, "EXAMPLE", None),
            causal,
        )

    def cache_spec(self, config: ModelConfig) -> CacheSpec:
        """The cache of a model whose layers all keep their keys and values, or those of their windows; of an encoder
        that of the layer that is being computed.

        Raises ConfigError for windows that are none.
        """
        value_dim = getattr(config, "value_dim", None)
        if value_dim is not None and (config.kv_heads != 1 or not 0 < value_dim <= config.head_dim):
            raise ConfigError(
                f"{self.name}: {type(config).__name__}.value_dim is {value_dim}, with {config.kv_heads} kv_heads of "
                f"head_dim {config.head_dim}; a latent has one kv head, and values of 1 to head_dim numbers"
            )
        if not self.causal:
            return CacheSpec(1, config.kv_heads, config.head_dim, value_dim=value_dim)
        windows = tuple(getattr(config, "windows", ()))
        if windows and (
            len(windows) != config.layers or not all(w is None or (isinstance(w, int) and w >= 1) for w in windows)
        ):
            raise ConfigError(
                f"{self.name}: {type(config).__name__}.windows is {windows}; needed are {config.layers} whole numbers "
                "above 0, or None where a layer sees everything"
            )
        return CacheSpec(config.layers, config.kv_heads, config.head_dim, windows, value_dim)


def _no_logits(params: Params, config: Any, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
    raise ConfigError("an encoder predicts no tokens; it gives embeddings: LLM.embed, /v1/embeddings")
