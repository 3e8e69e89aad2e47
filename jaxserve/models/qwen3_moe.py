"""Qwen3 with experts: Qwen3 whose feed-forward layers, all or some, are each a choice of experts.

T tokens in the step, S sampled rows, D width, N query heads, K kv heads, H head_dim, V vocab
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from jaxserve.layers import Rope, moe, project, rms_norm, rotate, swiglu
from jaxserve.quant import embed, linear_f32
from jaxserve.spec import Attend, Cache, expert_counts, matrix, only_served, weight
from jaxserve.taps import tap


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Of the layers without experts."""
    expert_ffn: int
    experts: int
    experts_used: int
    vocab: int
    max_positions: int
    rope: Rope
    eps: float
    tied: bool
    sparse: tuple[bool, ...]
    """Which layers have experts."""
    renormalise: bool
    attention_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(hf, hidden_act="silu", use_sliding_window=False)
        experts, used = expert_counts(hf)
        layers, dense, step = hf["num_hidden_layers"], hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
        return cls(
            layers=layers,
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads", 4),
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            ffn=hf["intermediate_size"],
            expert_ffn=hf["moe_intermediate_size"],
            experts=experts,
            experts_used=used,
            vocab=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 32768),
            rope=Rope.from_hf(hf),
            eps=hf.get("rms_norm_eps", 1e-6),
            tied=bool(hf.get("tie_word_embeddings")),
            sparse=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
            renormalise=bool(hf.get("norm_topk_prob")),
            attention_bias=bool(hf.get("attention_bias")),
        )


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def block(hf: str, sparse: bool) -> dict[str, Any]:
        biases = {
            "q_bias": w("heads head_dim", f"{hf}.self_attn.q_proj.bias"),
            "k_bias": w("kv_heads head_dim", f"{hf}.self_attn.k_proj.bias"),
            "v_bias": w("kv_heads head_dim", f"{hf}.self_attn.v_proj.bias"),
            "o_bias": w("width", f"{hf}.self_attn.o_proj.bias"),
        }
        experts = {
            "router": m("experts width", f"{hf}.mlp.gate.weight", precise=True),
            "gate": m("experts expert_ffn width", f"{hf}.mlp.experts.*.gate_proj.weight"),
            "up": m("experts expert_ffn width", f"{hf}.mlp.experts.*.up_proj.weight"),
            "down": m("experts width expert_ffn", f"{hf}.mlp.experts.*.down_proj.weight"),
        }
        dense = {
            "gate": m("ffn width", f"{hf}.mlp.gate_proj.weight"),
            "up": m("ffn width", f"{hf}.mlp.up_proj.weight"),
            "down": m("width ffn", f"{hf}.mlp.down_proj.weight"),
        }
        return {
            "attn_norm": w("width", f"{hf}.input_layernorm.weight"),
            "q": m("heads head_dim width", f"{hf}.self_attn.q_proj.weight"),
            "k": m("kv_heads head_dim width", f"{hf}.self_attn.k_proj.weight"),
            "v": m("kv_heads head_dim width", f"{hf}.self_attn.v_proj.weight"),
            "o": m("width heads head_dim", f"{hf}.self_attn.o_proj.weight"),
            **(biases if c.attention_bias else {}),
            "q_norm": w("head_dim", f"{hf}.self_attn.q_norm.weight"),
            "k_norm": w("head_dim", f"{hf}.self_attn.k_norm.weight"),
            "mlp_norm": w("width", f"{hf}.post_attention_layernorm.weight"),
            **(experts if sparse else dense),
        }

    return {
        "embed": m("vocab width", "model.embed_tokens.weight"),
        "blocks": [block(f"model.layers.{i}", sparse) for i, sparse in enumerate(c.sparse)],
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
    q = rotate(rms_norm(project(p, "q", h, out=2), p["q_norm"], c.eps), positions, c.rope)  # [T, N, H]
    k = rotate(rms_norm(project(p, "k", h, out=2), p["k_norm"], c.eps), positions, c.rope)  # [T, K, H]
    v = project(p, "v", h, out=2)  # [T, K, H]
    o, cache = attend(layer, q, k, v, cache)  # [T, N, H]
    x = x + tap(project(p, "o", o), f"layers.{layer}.attention")
    h = rms_norm(x, p["mlp_norm"], c.eps)
    h = moe(p, h, c.experts_used, renormalise=c.renormalise) if c.sparse[layer] else swiglu(p, h)
    x = x + tap(h, f"layers.{layer}.mlp")
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
