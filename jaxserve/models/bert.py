"""BERT (Devlin et al. 2018), as MiniLM, BGE and E5 have it: an encoder with learned positions and norms after.

T tokens in the step, D width, N heads, H head_dim, F ffn
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.layers import gelu_mlp, layer_norm, project
from jaxserve.quant import embed
from jaxserve.spec import Attend, Cache, matrix, only_served, weight
from jaxserve.taps import tap

CAUSAL = False


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    types: int
    max_positions: int
    eps: float

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(
            hf, hidden_act="gelu", position_embedding_type="absolute", is_decoder=False, add_cross_attention=False
        )
        width, heads = hf["hidden_size"], hf["num_attention_heads"]
        return cls(
            layers=hf["num_hidden_layers"],
            width=width,
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            ffn=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            positions=hf["max_position_embeddings"],
            types=hf.get("type_vocab_size", 2),
            max_positions=hf["max_position_embeddings"],
            eps=hf.get("layer_norm_eps", 1e-12),
        )


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def norm(name: str, hf: str) -> dict[str, Any]:
        return {name: w("width", f"{hf}.LayerNorm.weight"), f"{name}_bias": w("width", f"{hf}.LayerNorm.bias")}

    def block(hf: str) -> dict[str, Any]:
        attention, out = f"{hf}.attention.self", f"{hf}.attention.output"
        return {
            "q": m("heads head_dim width", f"{attention}.query.weight"),
            "q_bias": w("heads head_dim", f"{attention}.query.bias"),
            "k": m("kv_heads head_dim width", f"{attention}.key.weight"),
            "k_bias": w("kv_heads head_dim", f"{attention}.key.bias"),
            "v": m("kv_heads head_dim width", f"{attention}.value.weight"),
            "v_bias": w("kv_heads head_dim", f"{attention}.value.bias"),
            "o": m("width heads head_dim", f"{out}.dense.weight"),
            "o_bias": w("width", f"{out}.dense.bias"),
            **norm("attn_norm", out),
            "up": m("ffn width", f"{hf}.intermediate.dense.weight"),
            "up_bias": w("ffn", f"{hf}.intermediate.dense.bias"),
            "down": m("width ffn", f"{hf}.output.dense.weight"),
            "down_bias": w("width", f"{hf}.output.dense.bias"),
            **norm("mlp_norm", f"{hf}.output"),
        }

    return {
        "embed": m("vocab width", "embeddings.word_embeddings.weight"),
        "positions": w("positions width", "embeddings.position_embeddings.weight"),
        "types": w("types width", "embeddings.token_type_embeddings.weight"),
        **norm("norm", "embeddings"),
        "blocks": [block(f"encoder.layer.{i}") for i in range(c.layers)],
    }


def unused(name: str) -> bool:
    """The head of BERT's own pretraining task, and a row of numbers that some checkpoints hold."""
    return name.startswith("pooler.") or name == "embeddings.position_ids"


def block(
    p: dict[str, Any], c: Config, layer: int, x: Float[Array, "T D"], cache: Cache, attend: Attend
) -> tuple[Float[Array, "T D"], Cache]:
    q = project(p, "q", x, out=2)  # [T, N, H]
    k = project(p, "k", x, out=2)  # [T, N, H]
    v = project(p, "v", x, out=2)  # [T, N, H]
    o, cache = attend(0, q, k, v, cache, causal=False)  # nothing is read again: all layers have one place
    x = x + tap(project(p, "o", o), f"layers.{layer}.attention")
    x = layer_norm(x, p["attn_norm"], p["attn_norm_bias"], c.eps)
    x = x + tap(gelu_mlp(p, x), f"layers.{layer}.mlp")
    return tap(layer_norm(x, p["mlp_norm"], p["mlp_norm_bias"], c.eps), f"layers.{layer}.block"), cache


def forward(
    p: dict[str, Any],
    c: Config,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    cache: Cache,
    attend: Attend,
) -> tuple[Float[Array, "T D"], Cache]:
    x = embed(p["embed"], tokens) + p["positions"][positions]  # [T, D]
    x = x + jnp.broadcast_to(p["types"][0], x.shape)  # one text is all of the first type
    x = tap(layer_norm(x, p["norm"], p["norm_bias"], c.eps), "embed")
    for i, layer in enumerate(p["blocks"]):
        x, cache = block(layer, c, i, x, cache, attend)
    return x, cache
