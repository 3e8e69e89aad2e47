"""Phi-3, 3.5 and 4: Llama with q, k and v in one tensor, gate and up in another, and rope that two lists stretch.

T tokens in the step, S sampled rows, D width, N query heads, K kv heads, H head_dim, F ffn, V vocab
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from jaxserve.errors import ConfigError
from jaxserve.layers import Rope, project, rms_norm, rotate, swiglu
from jaxserve.quant import embed, linear_f32
from jaxserve.spec import Attend, Cache, matrix, only_served, stacked, weight
from jaxserve.taps import tap


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    original_positions: int
    rope: Rope
    long_rope: Rope
    eps: float
    tied: bool
    window: int | None

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.window,) * self.layers

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(hf, hidden_act="silu")
        rope, long_rope = _ropes(hf)
        return cls(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            ffn=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 4096),
            original_positions=hf.get("original_max_position_embeddings", 4096),
            rope=rope,
            long_rope=long_rope,
            eps=hf.get("rms_norm_eps", 1e-5),
            tied=bool(hf.get("tie_word_embeddings")),
            window=hf.get("sliding_window"),
        )

    @property
    def rope_in_use(self) -> Rope:
        """By the longest sequence that may come, not the one at hand: a cache cannot hold keys of both."""
        return self.long_rope if self.max_positions > self.original_positions else self.rope


def _ropes(hf: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """With the short and with the long list of divisors; without scaling both are the same."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    theta = float(scaling.get("rope_theta") or hf.get("rope_theta", 10_000.0))
    part = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    dims = int(part * head_dim)
    if dims % 2 or not 0 < dims <= head_dim:
        raise ConfigError(
            f"partial_rotary_factor {part} of head_dim {head_dim} is {dims}; served are even numbers up to it"
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta, dims=dims), Rope(theta, dims=dims)
    if kind not in ("longrope", "su"):
        raise ConfigError(f"rope scaling {kind!r} of phi3 is not served; served are default and longrope")
    original = hf.get("original_max_position_embeddings", 4096)
    stretch = scaling.get("factor") or hf.get("max_position_embeddings", 4096) / original
    magnitude = scaling.get("attention_factor") or math.sqrt(1 + math.log(max(stretch, 1.0)) / math.log(original))

    def rope(key: str) -> Rope:
        divisors = tuple(float(d) for d in scaling[key])
        if len(divisors) != dims // 2 or not all(d > 0 for d in divisors):
            raise ConfigError(f"config.json has {key}={scaling[key]!r}; served are {dims // 2} numbers above 0")
        return Rope(theta, "longrope", divisors=divisors, magnitude=magnitude, dims=dims)

    return rope("short_factor"), rope("long_factor")


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def block(hf: str) -> dict[str, Any]:
        return {
            "attn_norm": w("width", f"{hf}.input_layernorm.weight"),
            **stacked(
                c,
                f"{hf}.self_attn.qkv_proj.weight",
                q="heads head_dim width",
                k="kv_heads head_dim width",
                v="kv_heads head_dim width",
            ),
            "o": m("width heads head_dim", f"{hf}.self_attn.o_proj.weight"),
            "mlp_norm": w("width", f"{hf}.post_attention_layernorm.weight"),
            **stacked(c, f"{hf}.mlp.gate_up_proj.weight", gate="ffn width", up="ffn width"),
            "down": m("width ffn", f"{hf}.mlp.down_proj.weight"),
        }

    return {
        "embed": m("vocab width", "model.embed_tokens.weight"),
        "blocks": [block(f"model.layers.{i}") for i in range(c.layers)],
        "norm": w("width", "model.norm.weight"),
        **({} if c.tied else {"unembed": m("vocab width", "lm_head.weight")}),
    }


def block(
    p: dict[str, Any],
    c: Config,
    layer: int,
    x: Float[Array, "T D"],
    positions: Int[Array, " T"],
    cache: Cache,
    attend: Attend,
) -> tuple[Float[Array, "T D"], Cache]:
    h = rms_norm(x, p["attn_norm"], c.eps)
    q = rotate(project(p, "q", h, out=2), positions, c.rope_in_use)  # [T, N, H]
    k = rotate(project(p, "k", h, out=2), positions, c.rope_in_use)  # [T, K, H]
    v = project(p, "v", h, out=2)  # [T, K, H]
    o, cache = attend(layer, q, k, v, cache, window=c.window)  # [T, N, H]
    x = x + tap(project(p, "o", o), f"layers.{layer}.attention")
    x = x + tap(swiglu(p, rms_norm(x, p["mlp_norm"], c.eps)), f"layers.{layer}.mlp")
    return tap(x, f"layers.{layer}.block"), cache


def forward(
    p: dict[str, Any],
    c: Config,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    cache: Cache,
    attend: Attend,
) -> tuple[Float[Array, "T D"], Cache]:
    x = tap(embed(p["embed"], tokens), "embed")  # [T, D]
    for i, layer in enumerate(p["blocks"]):
        x, cache = block(layer, c, i, x, positions, cache, attend)
    return rms_norm(x, p["norm"], c.eps), cache


def logits(p: dict[str, Any], c: Config, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
    return linear_f32(hidden, p["embed"] if c.tied else p["unembed"])
