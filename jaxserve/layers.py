"""The building blocks that model files share: pure functions of arrays, no parameters of their own.

T tokens in the step, D width, N heads, H head_dim, F ffn
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxserve import native
from jaxserve.errors import ConfigError
from jaxserve.native.heads import by_head as native_by_head
from jaxserve.native.norm import layer_norm as native_layer_norm
from jaxserve.native.norm import rms_norm as native_rms_norm
from jaxserve.native.rope import rotate as native_rotate
from jaxserve.quant import grouped_linear, linear, linear_f32
from jaxserve.scaled import Scaled


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square norm (Zhang and Sennrich 2019), in float32, rounded before the weight as checkpoints expect.

    On CPU the C++ kernel does it where it is loaded: XLA sums a row in an order that its neighbours change.
    """
    return _normed(x, weight, eps, around_one=False)


def offset_rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Gemma's form of it: the weight is stored less 1, and the product is float32 as well, rounded once at the end."""
    return _normed(x, weight, eps, around_one=True)


def _normed(x: jax.Array, weight: jax.Array, eps: float, *, around_one: bool) -> jax.Array:
    def xla(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        if around_one:
            return (y * jnp.broadcast_to(1.0 + weight.astype(jnp.float32), y.shape)).astype(x.dtype)
        return y.astype(x.dtype) * jnp.broadcast_to(weight, y.shape)

    def cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        return native_rms_norm(rows, weight, eps, around_one=around_one).reshape(x.shape)

    known = x.dtype == weight.dtype and x.dtype in (jnp.float32, jnp.bfloat16)
    return native.by_platform(cpu if known else xla, xla, x, weight)


@jax.named_scope("norm")
def layer_norm(
    x: Float[Array, "T D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "T D"]:
    """Layer norm (Ba et al. 2016), in float32, rounded once at the end. On CPU in C++, as `rms_norm`."""

    def xla(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        scale, shift = (jnp.broadcast_to(a.astype(jnp.float32), y.shape) for a in (weight, bias))
        return (y * scale + shift).astype(x.dtype)

    def cpu(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return native_layer_norm(x, weight, bias, eps)

    known = x.dtype == weight.dtype == bias.dtype and x.dtype in (jnp.float32, jnp.bfloat16)
    return native.by_platform(cpu if known else xla, xla, x, weight, bias)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base and, for stretched contexts, how its frequencies are scaled.

    kind default; linear: positions divided by `factor`; llama3: Llama 3.1's smooth blend between the two, by
    wavelength relative to the original context; yarn (Peng et al. 2023): a blend along the dimensions, from where a
    wavelength fits the original context `beta_fast` times to where it does `beta_slow` times; longrope (Ding et al.
    2024): each frequency divided by one of `divisors`. Cosines and sines are multiplied by `magnitude`.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    divisors: tuple[float, ...] = ()
    magnitude: float = 1.0
    dims: int | None = None
    """How many dimensions of a head rotate, the first ones; None for all."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], theta: float = 10_000.0) -> "Rope":
        """Reads both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters.

        Raises ConfigError for a scaling that is not served.
        """
        scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        base = float(scaling.get("rope_theta", hf.get("rope_theta", theta)))
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return cls(base)
        if kind == "linear":
            return cls(base, kind, float(scaling["factor"]))
        if kind == "llama3":
            return cls(
                base,
                kind,
                float(scaling["factor"]),
                float(scaling["low_freq_factor"]),
                float(scaling["high_freq_factor"]),
                int(scaling.get("original_max_position_embeddings") or hf["max_position_embeddings"]),
            )
        raise ConfigError(f"rope scaling {kind!r} is not served; served are default, linear and llama3")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angular frequency of each pair of dimensions that rotate: float32 [head_dim / 2], or [dims / 2]."""
        dims = self.dims or head_dim
        freqs = self.theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
        if self.kind == "linear":
            freqs = freqs / self.factor
        elif self.kind == "llama3":
            wavelengths = 2 * math.pi / freqs
            # [.., original/high) kept   [original/high, original/low] blended   (original/low, ..) divided by factor
            kept = (self.original_positions / wavelengths - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            kept = np.clip(kept, 0.0, 1.0)
            freqs = kept * freqs + (1 - kept) * freqs / self.factor
        elif self.kind == "yarn":
            low, high = (
                dims * math.log(self.original_positions / (beta * 2 * math.pi)) / (2 * math.log(self.theta))
                for beta in (self.beta_fast, self.beta_slow)
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), dims - 1)
            divided = np.clip((np.arange(dims // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
            freqs = (1 - divided) * freqs + divided * freqs / self.factor
        elif self.kind == "longrope":
            freqs = freqs / np.asarray(self.divisors)
        return freqs.astype(np.float32)


@jax.named_scope("rope")
def rotate(x: Float[Array, "T N H"], positions: Int[Array, " T"], rope: Rope) -> Float[Array, "T N H"]:
    """Rotates the pairs (i, i + H/2) of every head by its position: x [T, N, H], positions [T].

    Where only the first `rope.dims` of H rotate, these are the pairs (i, i + dims/2), and the others stay.
    """
    half = (rope.dims or x.shape[-1]) // 2
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rope.frequencies(x.shape[-1]))[None, :]  # [T, half]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.magnitude != 1.0:
        cos, sin = rope.magnitude * cos, rope.magnitude * sin

    def xla(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
        a, b, cos, sin = a.astype(jnp.float32), b.astype(jnp.float32), cos[:, None, :], sin[:, None, :]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
        return jnp.concatenate([turned, rest], axis=-1) if rest.size else turned

    known = x.dtype in (jnp.float32, jnp.bfloat16)
    return native.by_platform(native_rotate if known else xla, xla, x, cos, sin)


def project(p: Mapping[str, Any], name: str, x: Float[Array, "T ..."], *, out: int = 1) -> Float[Array, "T ..."]:
    """x through weight p[name], plus its bias p[name_bias] where the block has one -> [T, outputs...]."""
    with jax.named_scope(name):
        y = linear(x, p[name], out=out)
        bias = p.get(f"{name}_bias")
        return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def by_head(
    x: Float[Array, "T N I"], w: Float[Array, "N M R"], rows: slice, *, transposed: bool = False
) -> Float[Array, "T N O"]:
    """Each head's numbers times `rows` of a matrix of its own, x [T, N, rows] -> [T, N, R]; or with `transposed`
    x [T, N, R] -> [T, N, rows]. Summed in float32 and rounded once.

    On CPU the C++ kernel does it where it is loaded, so that a token's bits do not depend on other tokens.
    """

    def xla(x: jax.Array, w: jax.Array) -> jax.Array:
        sums = "tnr,nir->tni" if transposed else "tni,nir->tnr"
        return jnp.einsum(sums, x, w[:, rows], preferred_element_type=jnp.float32).astype(x.dtype)

    first, end, _ = rows.indices(w.shape[1])
    outputs = end - first if transposed else w.shape[2]
    cpu = partial(native_by_head, first=first, outputs=outputs, transposed=transposed)
    known = {x.dtype, w.dtype} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    return native.by_platform(cpu if known else xla, xla, x, w)


def swiglu(p: Mapping[str, Any], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """Gated feed-forward (Shazeer 2020) of the block's gate, up and down: down(silu(gate x) * up x)."""
    return project(p, "down", jax.nn.silu(project(p, "gate", x)) * project(p, "up", x))


def geglu(p: Mapping[str, Any], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The same with GELU (Shazeer 2020) in its tanh form: down(gelu(gate x) * up x)."""
    return project(p, "down", jax.nn.gelu(project(p, "gate", x), approximate=True) * project(p, "up", x))


def gelu_mlp(p: Mapping[str, Any], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """Plain feed-forward of the block's up and down with GELU in its exact form: down(gelu(up x))."""
    return project(p, "down", jax.nn.gelu(project(p, "up", x), approximate=False))


@jax.named_scope("moe")
def moe(
    p: Mapping[str, Any],
    x: Float[Array, "T D"],
    used: int,
    *,
    renormalise: bool = True,
    groups: tuple[int, int] | None = None,
    scale: float = 1.0,
) -> Float[Array, "T D"]:
    """Mixture of experts (Shazeer et al. 2017) of the block's router [E, D] and gate, up [E, F, D] and down [E, D, F].

    Each token goes through the `used` experts whose router logits are largest, all SwiGLU, and none is dropped; their
    sum is weighted by the softmax of the logits, over those alone where `renormalise`, else over all. Routing and sum
    are float32. A token's result does not depend on the others: every sum has an order of its own.

    `groups` (how many, how many of them used) limits the choice to groups of experts that lie side by side, those with
    the largest logits; the block's `shared`, if there is one, is a SwiGLU that every token goes through besides, and
    `scale` multiplies what the others give (DeepSeek-AI 2024, arXiv 2405.04434).
    """
    logits = linear_f32(x, p["router"])  # [T, E]
    open_to = logits if groups is None else _best_groups(logits, *groups)
    best, experts = jax.lax.top_k(open_to, used)  # [T, U], the largest first
    powers = jnp.exp(best - best[:, :1])
    total = _sum_in_halves(powers if renormalise else jnp.exp(logits - best[:, :1]))
    weights = scale * powers / total[:, None]  # [T, U]

    chosen = experts.reshape(-1)  # [T * U]
    order = jnp.argsort(chosen, stable=True)  # expert after expert
    sizes = jnp.sum(chosen[:, None] == jnp.arange(logits.shape[1])[None, :], axis=0, dtype=jnp.int32)  # [E]
    stacks, shared = {name: p[name] for name in ("gate", "up", "down")}, p.get("shared")

    def through(x: Any, weights: Any, order: Any, sizes: Any, first: Any, stacks: Any, shared: Any) -> jax.Array:
        out = _through_experts(x, weights, order, sizes, first, **stacks)
        return out if shared is None else out + swiglu(shared, x)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return through(x, weights, order, sizes, None, stacks, shared)

    def own(x: Any, weights: Any, order: Any, sizes: Any, firsts: Any, stacks: Any, shared: Any) -> jax.Array:
        first = firsts[0] if mesh.shape["expert"] > 1 else None
        return jax.lax.psum(through(x, weights, order, sizes, first, stacks, shared), every)

    # As the rules of sharding.py lay them. Devices add up what tokens get, not what each of a token's choices gives.
    every = "expert", "model"
    outputs, inputs = P("expert", "model", None), P("expert", None, "model")
    of_stacks = {"gate": outputs, "up": outputs, "down": inputs}
    of_shared = {"gate": P(every, None), "up": P(every, None), "down": P(None, every)}
    lie = _as_they_lie(stacks, of_stacks), None if shared is None else _as_they_lie(shared, of_shared)
    specs = (P(), P(), P(), P("expert"), P("expert"), *lie)
    divided = jax.shard_map(own, in_specs=specs, out_specs=P(), check_vma=False)  # a kernel does not say what varies
    result: jax.Array = divided(x, weights, order, sizes, jnp.cumsum(sizes) - sizes, stacks, shared)
    return result


def _as_they_lie(weights: Mapping[str, Any], plain: Mapping[str, P]) -> dict[str, P]:
    """How weights are divided, `plain` those that are not quantised; all arrays of one that is are divided alike."""
    return {name: w.specs[0] if isinstance(w, Scaled) else plain[name] for name, w in weights.items()}


def _through_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T U"],
    order: Int[Array, " R"],
    sizes: Int[Array, " E"],
    first: Int[Array, ""] | None,
    gate: Any,
    up: Any,
    down: Any,
) -> Float[Array, "T D"]:
    """What E experts, all or those of one device, add to each token.

    Every token has U choices; all tokens' R = T * U lie in `order` expert after expert, those of these experts, `sizes`
    of each, from `first` on (None: 0). Another expert's choice adds nothing.
    """
    rows = x[order // weights.shape[1]]
    hidden = jax.nn.silu(grouped_linear(rows, gate, sizes, first)) * grouped_linear(rows, up, sizes, first)
    out = grouped_linear(hidden, down, sizes, first)[jnp.argsort(order)]  # [T * U, D], token after token
    out = out.reshape(*weights.shape, -1).astype(jnp.float32) * weights[:, :, None]
    return _sum_in_halves(out).astype(x.dtype)


def _best_groups(logits: Float[Array, "T E"], count: int, used: int) -> Float[Array, "T E"]:
    """Minus infinity for the experts of all but the `used` groups that have the largest logits."""
    _, chosen = jax.lax.top_k(jnp.max(logits.reshape(len(logits), count, -1), axis=-1), used)  # [T, used]
    open_to = jnp.any(chosen[:, :, None] == jnp.arange(count)[None, None, :], axis=1)  # [T, count]
    return jnp.where(jnp.repeat(open_to, logits.shape[1] // count, axis=1), logits, -jnp.inf)


def _sum_in_halves(x: Float[Array, "T N ..."]) -> Float[Array, "T ..."]:
    """The sum over the second axis, always in the same order; XLA's own takes one that the other axes change."""
    while (n := x.shape[1]) > 1:
        half = n // 2
        pairs = x[:, :half] + x[:, half : 2 * half]
        x = pairs if n % 2 == 0 else jnp.concatenate([pairs, x[:, -1:]], axis=1)
    return x[:, 0]


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Bounds x smoothly: cap * tanh(x / cap); None leaves it."""
    return x if cap is None else cap * jnp.tanh(x / cap)
