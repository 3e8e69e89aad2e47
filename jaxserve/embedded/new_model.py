"""NewModel: say here what it is. A model file is four things: Config, param_specs, forward and logits.

    jaxserve check new_model.py                            # after every change
    jaxserve serve CHECKPOINT --model-code new_model.py

As it stands it is a small decoder of the Llama family, spelt out so that each part can be replaced.

T tokens in the step, S sampled rows, D width, N query heads, K kv heads, H head_dim, F ffn, V vocab
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxserve.layers import Rope, rms_norm, rotate
from jaxserve.quant import embed, linear, linear_f32
from jaxserve.spec import Attend, Cache, matrix, only_served, weight
from jaxserve.taps import tap

# A config.json of a model that is small enough to play with: `jaxserve check` computes with it, and
# `jaxserve new-checkpoint` writes random weights of these sizes.
EXAMPLE = {
    "architectures": ["NewModelForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@dataclass(frozen=True)
class Config:
    """The sizes. The first seven are the engine's as well and keep their names; the others are yours."""

    layers: int
    width: int
    heads: int
    kv_heads: int  # as many as heads, or fewer that share (grouped-query attention)
    head_dim: int
    vocab: int
    max_positions: int
    ffn: int
    rope: Rope
    eps: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """From a checkpoint's config.json. Refuse what forward does not compute: a wrong answer is worse than none."""
        only_served(hf, hidden_act="silu", attention_bias=False, tie_word_embeddings=False)
        return cls(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf["num_key_value_heads"],
            head_dim=hf["hidden_size"] // hf["num_attention_heads"],
            vocab=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            ffn=hf["intermediate_size"],
            rope=Rope.from_hf(hf),
            eps=hf["rms_norm_eps"],
        )


def param_specs(c: Config) -> dict[str, Any]:
    """The tree of weights, in any shape you like: forward gets the same tree, of arrays.

    Each line says the axes, which are fields of Config, and the tensor's name in the checkpoint; torch's order, outputs
    first. `m` for a matrix that only linear, linear_f32 and embed touch: it may be quantised. `w` for any other weight.
    """
    w, m = partial(weight, c), partial(matrix, c)

    def block(i: int) -> dict[str, Any]:
        return {
            "attn_norm": w("width", f"model.layers.{i}.input_layernorm.weight"),
            "q": m("heads head_dim width", f"model.layers.{i}.self_attn.q_proj.weight"),
            "k": m("kv_heads head_dim width", f"model.layers.{i}.self_attn.k_proj.weight"),
            "v": m("kv_heads head_dim width", f"model.layers.{i}.self_attn.v_proj.weight"),
            "o": m("width heads head_dim", f"model.layers.{i}.self_attn.o_proj.weight"),
            "mlp_norm": w("width", f"model.layers.{i}.post_attention_layernorm.weight"),
            "gate": m("ffn width", f"model.layers.{i}.mlp.gate_proj.weight"),
            "up": m("ffn width", f"model.layers.{i}.mlp.up_proj.weight"),
            "down": m("width ffn", f"model.layers.{i}.mlp.down_proj.weight"),
        }

    return {
        "embed": m("vocab width", "model.embed_tokens.weight"),
        "blocks": [block(i) for i in range(c.layers)],
        "norm": w("width", "model.norm.weight"),
        "unembed": m("vocab width", "lm_head.weight"),
    }


def forward(
    p: dict[str, Any], c: Config, tokens: jax.Array, positions: jax.Array, cache: Cache, attend: Attend
) -> tuple[jax.Array, Cache]:
    """tokens [T] and positions [T] -> hidden [T, D], and the cache.

    The T tokens belong to several sequences, and to each perhaps only the next piece of it: `positions` says where a
    token stands in its own. So nothing may look along T, except `attend`, which knows who belongs to whom.
    """
    x = tap(embed(p["embed"], tokens), "embed")  # [T, D]
    for i, layer in enumerate(p["blocks"]):
        x, cache = block(layer, c, i, x, positions, cache, attend)
    return rms_norm(x, p["norm"], c.eps), cache


def block(
    p: dict[str, Any], c: Config, layer: int, x: jax.Array, positions: jax.Array, cache: Cache, attend: Attend
) -> tuple[jax.Array, Cache]:
    h = rms_norm(x, p["attn_norm"], c.eps)  # [T, D]
    # `out` is how many leading axes of the weight are outputs: here heads and head_dim.
    q = rotate(linear(h, p["q"], out=2), positions, c.rope)  # [T, N, H]
    k = rotate(linear(h, p["k"], out=2), positions, c.rope)  # [T, K, H]
    v = linear(h, p["v"], out=2)  # [T, K, H]
    # Writes k and v into this layer's part of the cache, then attends to all of the past that is there. Hand the cache
    # on: what one layer wrote is lost if another goes on with an older one. Keywords: scale, window, soft_cap, sinks.
    o, cache = attend(layer, q, k, v, cache)  # [T, N, H]
    # tap gives a value a name for `jaxserve batch --capture`, and costs nothing. Name whatever you want to look at.
    x = x + tap(linear(o, p["o"]), f"layers.{layer}.attention")
    h = rms_norm(x, p["mlp_norm"], c.eps)
    h = linear(jax.nn.silu(linear(h, p["gate"])) * linear(h, p["up"]), p["down"])
    x = x + tap(h, f"layers.{layer}.mlp")
    return tap(x, f"layers.{layer}.block"), cache


def logits(p: dict[str, Any], c: Config, hidden: jax.Array) -> jax.Array:
    """hidden [S, D] of the rows that are sampled -> float32 [S, V]."""
    return linear_f32(hidden, p["unembed"])
