"""GPT-NeoX (Pythia): LayerNorm, biases, partial rotary attention, and attention and MLP side by side in each block.

A model outside the package, genuinely another than those in it:

    jaxserve check examples/gpt_neox.py
    jaxserve serve EleutherAI/pythia-160m --model-code examples/gpt_neox.py

T tokens in the step, S sampled rows, D width, N heads, H head_dim, F ffn, V vocab
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.layers import Rope, project, rotate
from jaxserve.quant import embed, linear_f32
from jaxserve.spec import Attend, Cache, matrix, only_served, weight
from jaxserve.taps import tap

EXAMPLE = {
    "architectures": ["GPTNeoXForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "rotary_pct": 0.5,
}


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
    rotary_dim: int
    """Dimensions of each head that are rotated; the others know no position."""
    eps: float
    tied: bool
    qkv: int = 3
    """Query, key and value of a head lie one after the other in one weight."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(hf, hidden_act="gelu", use_parallel_residual=True, attention_bias=True, rope_scaling=None)
        rope = hf.get("rope_parameters") or {}  # as transformers 5 spells it
        only_served(rope, rope_type="default")
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        share = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
        return cls(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf["num_attention_heads"],
            head_dim=head_dim,
            ffn=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            rope=Rope(float(rope.get("rope_theta", hf.get("rotary_emb_base", 10_000)))),
            rotary_dim=int(head_dim * share),
            eps=hf.get("layer_norm_eps", 1e-5),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def unused(name: str) -> bool:
    """The causal masks and frequencies that the published checkpoints hold; all of them are computed here."""
    return name.endswith((".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"))


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def block(hf: str) -> dict[str, Any]:
        return {
            "attn_norm": w("width", f"{hf}.input_layernorm.weight"),
            "attn_norm_bias": w("width", f"{hf}.input_layernorm.bias"),
            "qkv": m("heads qkv head_dim width", f"{hf}.attention.query_key_value.weight"),
            "qkv_bias": w("heads qkv head_dim", f"{hf}.attention.query_key_value.bias"),
            "o": m("width heads head_dim", f"{hf}.attention.dense.weight"),
            "o_bias": w("width", f"{hf}.attention.dense.bias"),
            "mlp_norm": w("width", f"{hf}.post_attention_layernorm.weight"),
            "mlp_norm_bias": w("width", f"{hf}.post_attention_layernorm.bias"),
            "up": m("ffn width", f"{hf}.mlp.dense_h_to_4h.weight"),
            "up_bias": w("ffn", f"{hf}.mlp.dense_h_to_4h.bias"),
            "down": m("width ffn", f"{hf}.mlp.dense_4h_to_h.weight"),
            "down_bias": w("width", f"{hf}.mlp.dense_4h_to_h.bias"),
        }

    return {
        "embed": m("vocab width", "gpt_neox.embed_in.weight"),
        "blocks": [block(f"gpt_neox.layers.{i}") for i in range(c.layers)],
        "norm": w("width", "gpt_neox.final_layer_norm.weight"),
        "norm_bias": w("width", "gpt_neox.final_layer_norm.bias"),
        **({} if c.tied else {"unembed": m("vocab width", "embed_out.weight")}),
    }


def layer_norm(p: dict[str, Any], name: str, x: Float[Array, "T D"], eps: float) -> Float[Array, "T D"]:
    """Layer norm (Ba et al. 2016) in float32, rounded once at the end."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + eps)
    scale, bias = (p[n].astype(jnp.float32)[None, :] for n in (name, f"{name}_bias"))
    return (y * scale + bias).astype(x.dtype)


def block(
    p: dict[str, Any],
    c: Config,
    layer: int,
    x: Float[Array, "T D"],
    positions: Int[Array, " T"],
    cache: Cache,
    attend: Attend,
) -> tuple[Float[Array, "T D"], Cache]:
    def turned(x: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        first, rest = x[..., : c.rotary_dim], x[..., c.rotary_dim :]
        return jnp.concatenate([rotate(first, positions, c.rope), rest], axis=-1)

    qkv = project(p, "qkv", layer_norm(p, "attn_norm", x, c.eps), out=3)  # [T, N, 3, H]
    o, cache = attend(layer, turned(qkv[:, :, 0]), turned(qkv[:, :, 1]), qkv[:, :, 2], cache)  # [T, N, H]
    up = project(p, "up", layer_norm(p, "mlp_norm", x, c.eps))  # of x as well: the two branches are parallel
    attention = tap(project(p, "o", o), f"layers.{layer}.attention")
    mlp = tap(project(p, "down", jax.nn.gelu(up, approximate=False)), f"layers.{layer}.mlp")
    return tap(x + attention + mlp, f"layers.{layer}.block"), cache


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
    return layer_norm(p, "norm", x, c.eps), cache


def logits(p: dict[str, Any], c: Config, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
    return linear_f32(hidden, p["embed"] if c.tied else p["unembed"])
