"""Gemma 2: norms before and after each half of a block, capped scores and logits, a window on every other layer.

T tokens in the step, S sampled rows, D width, N query heads, K kv heads, H head_dim, F ffn, V vocab
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.layers import Rope, geglu, offset_rms_norm, project, rotate, soft_cap
from jaxserve.quant import embed, linear_f32
from jaxserve.spec import Attend, Cache, cap_of, matrix, only_served, sliding_layers, weight
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
    rope: Rope
    eps: float
    tied: bool
    scale: float
    windows: tuple[int | None, ...]
    score_cap: float | None
    logit_cap: float | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(hf, hidden_activation="gelu_pytorch_tanh", attention_bias=False, use_bidirectional_attention=False)
        window = hf.get("sliding_window", 4096)
        return cls(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim", 256),
            ffn=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 8192),
            rope=Rope.from_hf(hf),
            eps=hf.get("rms_norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings") is not False,
            scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
            windows=tuple(window if sliding else None for sliding in sliding_layers(hf, 2)),
            score_cap=cap_of(hf, "attn_logit_softcapping", 50.0),
            logit_cap=cap_of(hf, "final_logit_softcapping", 30.0),
        )


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def block(hf: str) -> dict[str, Any]:
        return {
            "attn_norm": w("width", f"{hf}.input_layernorm.weight"),
            "q": m("heads head_dim width", f"{hf}.self_attn.q_proj.weight"),
            "k": m("kv_heads head_dim width", f"{hf}.self_attn.k_proj.weight"),
            "v": m("kv_heads head_dim width", f"{hf}.self_attn.v_proj.weight"),
            "o": m("width heads head_dim", f"{hf}.self_attn.o_proj.weight"),
            "attn_post_norm": w("width", f"{hf}.post_attention_layernorm.weight"),
            "mlp_norm": w("width", f"{hf}.pre_feedforward_layernorm.weight"),
            "gate": m("ffn width", f"{hf}.mlp.gate_proj.weight"),
            "up": m("ffn width", f"{hf}.mlp.up_proj.weight"),
            "down": m("width ffn", f"{hf}.mlp.down_proj.weight"),
            "mlp_post_norm": w("width", f"{hf}.post_feedforward_layernorm.weight"),
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
    h = offset_rms_norm(x, p["attn_norm"], c.eps)
    q = rotate(project(p, "q", h, out=2), positions, c.rope)  # [T, N, H]
    k = rotate(project(p, "k", h, out=2), positions, c.rope)  # [T, K, H]
    v = project(p, "v", h, out=2)  # [T, K, H]
    o, cache = attend(layer, q, k, v, cache, scale=c.scale, window=c.windows[layer], soft_cap=c.score_cap)  # [T, N, H]
    x = x + tap(offset_rms_norm(project(p, "o", o), p["attn_post_norm"], c.eps), f"layers.{layer}.attention")
    h = geglu(p, offset_rms_norm(x, p["mlp_norm"], c.eps))
    x = x + tap(offset_rms_norm(h, p["mlp_post_norm"], c.eps), f"layers.{layer}.mlp")
    return tap(x, f"layers.{layer}.block"), cache


def forward(
    p: dict[str, Any],
    c: Config,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    cache: Cache,
    attend: Attend,
) -> tuple[Float[Array, "T D"], Cache]:
    x = embed(p["embed"], tokens)  # [T, D]
    x = tap(x * jnp.asarray(c.width**0.5, x.dtype), "embed")  # rounded as it was in training
    for i, layer in enumerate(p["blocks"]):
        x, cache = block(layer, c, i, x, positions, cache, attend)
    return offset_rms_norm(x, p["norm"], c.eps), cache


def logits(p: dict[str, Any], c: Config, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
    return soft_cap(linear_f32(hidden, p["embed"] if c.tied else p["unembed"]), c.logit_cap)
