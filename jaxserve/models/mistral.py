"""Mistral: Llama with every layer looking back over a sliding window.

T tokens in the step, S sampled rows, D width, N query heads, K kv heads, H head_dim, F ffn, V vocab
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from jaxserve.layers import Rope, project, rms_norm, rotate, swiglu
from jaxserve.quant import embed, linear_f32
from jaxserve.spec import Attend, Cache, matrix, only_served, weight
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
    window: int | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(hf, hidden_act="silu")
        return cls(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads", 8),
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            ffn=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 131072),
            rope=Rope.from_hf(hf),
            eps=hf.get("rms_norm_eps", 1e-6),
            tied=bool(hf.get("tie_word_embeddings")),
            window=hf.get("sliding_window", 4096),
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.window,) * self.layers


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def block(hf: str) -> dict[str, Any]:
        return {
            "attn_norm": w("width", f"{hf}.input_layernorm.weight"),
            "q": m("heads head_dim width", f"{hf}.self_attn.q_proj.weight"),
            "k": m("kv_heads head_dim width", f"{hf}.self_attn.k_proj.weight"),
            "v": m("kv_heads head_dim width", f"{hf}.self_attn.v_proj.weight"),
            "o": m("width heads head_dim", f"{hf}.self_attn.o_proj.weight"),
            "mlp_norm": w("width", f"{hf}.post_attention_layernorm.weight"),
            "gate": m("ffn width", f"{hf}.mlp.gate_proj.weight"),
            "up": m("ffn width", f"{hf}.mlp.up_proj.weight"),
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
    q = rotate(project(p, "q", h, out=2), positions, c.rope)  # [T, N, H]
    k = rotate(project(p, "k", h, out=2), positions, c.rope)  # [T, K, H]
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
