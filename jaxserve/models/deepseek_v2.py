"""DeepSeek-V2 and V2-Lite: heads that share one latent a token, and experts beside some that every token goes through.

Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434) in its absorbed form: the matrices that would make each
head's keys and values of a latent are multiplied with queries and results instead, so that latents alone are kept.
Decoding reads far less for it; a prompt's scores cost more products, over H numbers a head instead of q_dim.

T tokens in the step, S sampled rows, D width, N query heads, H head_dim of a latent (kv_rank R and rope_dim P), V vocab
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.errors import ConfigError
from jaxserve.layers import Rope, by_head, moe, project, rms_norm, rotate, swiglu
from jaxserve.quant import embed, linear_f32
from jaxserve.spec import Attend, Cache, expert_counts, matrix, only_served, weight
from jaxserve.taps import tap

RANK_EPS = 1e-6
"""Of the norms of what was projected down, whatever config.json says of the others."""


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    q_rank: int | None
    """None: queries are projected at once."""
    kv_rank: int
    nope_dim: int
    """Of a head's query, the numbers without rope, which come first."""
    rope_dim: int
    v_dim: int
    ffn: int
    """Of the layers without experts, which are the first ones."""
    dense_layers: int
    expert_ffn: int
    shared_ffn: int
    """Of all shared experts together, which are one."""
    experts: int
    experts_used: int
    groups: tuple[int, int] | None
    """Of experts: how many, and how many of them a token's may be in; None: they may be anywhere."""
    experts_scale: float
    vocab: int
    max_positions: int
    rope: Rope
    scale: float
    eps: float
    tied: bool

    @property
    def kv_heads(self) -> int:
        return 1

    @property
    def head_dim(self) -> int:
        return self.kv_rank + self.rope_dim

    @property
    def value_dim(self) -> int:
        return self.kv_rank

    @property
    def q_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def kv_up_dim(self) -> int:
        """What a head has of a latent: a key without rope, and a value."""
        return self.nope_dim + self.v_dim

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(
            hf, hidden_act="silu", attention_bias=False, mlp_bias=False, moe_layer_freq=1, scoring_func="softmax",
            norm_topk_prob=False,
        )  # fmt: skip
        experts, used = expert_counts(hf)
        nope_dim, rope_dim = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"]
        rope, magnitude = _rope(hf)
        return cls(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            q_rank=hf["q_lora_rank"],
            kv_rank=hf["kv_lora_rank"],
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            v_dim=hf["v_head_dim"],
            ffn=hf["intermediate_size"],
            dense_layers=hf.get("first_k_dense_replace", 0),
            expert_ffn=hf["moe_intermediate_size"],
            shared_ffn=hf["moe_intermediate_size"] * hf["n_shared_experts"],
            experts=experts,
            experts_used=used,
            groups=_groups(hf, experts, used),
            experts_scale=float(hf.get("routed_scaling_factor", 1.0)),
            vocab=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 2048),
            rope=rope,
            scale=magnitude * (nope_dim + rope_dim) ** -0.5,
            eps=hf.get("rms_norm_eps", 1e-6),
            tied=bool(hf.get("tie_word_embeddings")),
        )


def _groups(hf: Mapping[str, Any], experts: int, used: int) -> tuple[int, int] | None:
    method = hf.get("topk_method") or "greedy"
    if method == "greedy":
        return None
    if method != "group_limited_greedy":
        raise ConfigError(f"config.json has topk_method={method!r}; served are greedy and group_limited_greedy")
    groups, open_to = hf["n_group"], hf["topk_group"]
    if experts % groups or not 0 < open_to <= groups or used > experts // groups * open_to:
        raise ConfigError(
            f"config.json has n_group={groups} and topk_group={open_to}, which do not give {used} of {experts} experts"
        )
    return groups, open_to


def _rope(hf: Mapping[str, Any]) -> tuple[Rope, float]:
    """And what scores are multiplied by: DeepSeek puts most of YaRN's magnitude there, by mscale_all_dim."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or hf.get("rope_theta", 10_000.0))
    if kind == "default":
        return Rope(theta), 1.0
    if kind != "yarn":
        raise ConfigError(f"rope scaling {kind!r} of deepseek_v2 is not served; served are default and yarn")
    only_served(scaling, truncate=True)
    factor = float(scaling["factor"])

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0

    own, of_scores = scaling.get("mscale"), scaling.get("mscale_all_dim")
    rest = magnitude(own) / magnitude(of_scores) if own and of_scores else magnitude(1.0)
    rope = Rope(
        theta,
        kind,
        factor,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        original_positions=int(scaling["original_max_position_embeddings"]),
        magnitude=float(scaling.get("attention_factor") or rest),
    )
    return rope, magnitude(of_scores) ** 2 if of_scores else 1.0


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def swiglu_of(hf: str, ffn: str) -> dict[str, Any]:
        return {
            "gate": m(f"{ffn} width", f"{hf}.gate_proj.weight"),
            "up": m(f"{ffn} width", f"{hf}.up_proj.weight"),
            "down": m(f"width {ffn}", f"{hf}.down_proj.weight"),
        }

    def block(hf: str, sparse: bool) -> dict[str, Any]:
        by_rank = {
            "q_a": m("q_rank width", f"{hf}.self_attn.q_a_proj.weight"),
            "q_norm": w("q_rank", f"{hf}.self_attn.q_a_layernorm.weight"),
            "q": m("heads q_dim q_rank", f"{hf}.self_attn.q_b_proj.weight"),
        }
        at_once = {"q": m("heads q_dim width", f"{hf}.self_attn.q_proj.weight")}
        experts = {
            "router": m("experts width", f"{hf}.mlp.gate.weight", precise=True),
            "gate": m("experts expert_ffn width", f"{hf}.mlp.experts.*.gate_proj.weight"),
            "up": m("experts expert_ffn width", f"{hf}.mlp.experts.*.up_proj.weight"),
            "down": m("experts width expert_ffn", f"{hf}.mlp.experts.*.down_proj.weight"),
            "shared": swiglu_of(f"{hf}.mlp.shared_experts", "shared_ffn"),
        }
        return {
            "attn_norm": w("width", f"{hf}.input_layernorm.weight"),
            **(at_once if c.q_rank is None else by_rank),
            "kv_a": m("head_dim width", f"{hf}.self_attn.kv_a_proj_with_mqa.weight"),
            "kv_norm": w("kv_rank", f"{hf}.self_attn.kv_a_layernorm.weight"),
            "kv_b": w("heads kv_up_dim kv_rank", f"{hf}.self_attn.kv_b_proj.weight"),
            "o": m("width heads v_dim", f"{hf}.self_attn.o_proj.weight"),
            "mlp_norm": w("width", f"{hf}.post_attention_layernorm.weight"),
            **(experts if sparse else swiglu_of(f"{hf}.mlp", "ffn")),
        }

    return {
        "embed": m("vocab width", "model.embed_tokens.weight"),
        "blocks": [block(f"model.layers.{i}", i >= c.dense_layers) for i in range(c.layers)],
        "norm": w("width", "model.norm.weight"),
        **({} if c.tied else {"unembed": m("vocab width", "lm_head.weight")}),
    }


def attention(
    p: dict[str, Any],
    c: Config,
    layer: int,
    x: Float[Array, "T D"],
    positions: Int[Array, " T"],
    cache: Cache,
    attend: Attend,
) -> tuple[Float[Array, "T D"], Cache]:
    compressed, shared_key = jnp.split(project(p, "kv_a", x), [c.kv_rank], axis=-1)  # [T, R], [T, P]
    compressed = rms_norm(compressed, p["kv_norm"], RANK_EPS)
    shared_key = rotate(_halves(shared_key[:, None]), positions, c.rope)  # [T, 1, P]
    latent = jnp.concatenate([compressed[:, None], shared_key], axis=-1)  # [T, 1, H]

    to_key, to_value = slice(0, c.nope_dim), slice(c.nope_dim, None)  # of kv_b's rows [N, nope_dim + v_dim, R]
    h = x if c.q_rank is None else rms_norm(project(p, "q_a", x), p["q_norm"], RANK_EPS)
    plain, rotated = jnp.split(project(p, "q", h, out=2), [c.nope_dim], axis=-1)
    rotated = rotate(_halves(rotated), positions, c.rope)  # [T, N, P]
    q = jnp.concatenate([by_head(plain, p["kv_b"], to_key), rotated], axis=-1)  # [T, N, H]
    o, cache = attend(layer, q, latent, None, cache, scale=c.scale, value_dim=c.value_dim)  # [T, N, R]
    return project(p, "o", by_head(o, p["kv_b"], to_value, transposed=True)), cache


def _halves(x: Float[Array, "T N P"]) -> Float[Array, "T N P"]:
    """The checkpoint rotates the pairs (2i, 2i + 1), `rotate` those of two halves; q.k is the same in any order."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def block(
    p: dict[str, Any],
    c: Config,
    layer: int,
    x: Float[Array, "T D"],
    positions: Int[Array, " T"],
    cache: Cache,
    attend: Attend,
) -> tuple[Float[Array, "T D"], Cache]:
    o, cache = attention(p, c, layer, rms_norm(x, p["attn_norm"], c.eps), positions, cache, attend)
    x = x + tap(o, f"layers.{layer}.attention")
    h = rms_norm(x, p["mlp_norm"], c.eps)
    if layer < c.dense_layers:
        h = swiglu(p, h)
    else:
        h = moe(p, h, c.experts_used, renormalise=False, groups=c.groups, scale=c.experts_scale)
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
