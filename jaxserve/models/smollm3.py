"""SmolLM3: Llama whose every fourth layer has no rope, and may have a sliding window.

T tokens in the step, S sampled rows, D width, N query heads, K kv heads, H head_dim, F ffn, V vocab
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from jaxserve.errors import ConfigError
from jaxserve.layers import Rope, project, rms_norm, rotate, swiglu
from jaxserve.quant import embed, linear_f32
from jaxserve.spec import Attend, Cache, matrix, only_served, sliding_layers, weight
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
    rotated: tuple[bool, ...]
    """Which layers have rope."""
    windows: tuple[int | None, ...]
    eps: float
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        only_served(hf, hidden_act="silu")
        rotated = _rotated(hf)
        return cls(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads", 4) or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            ffn=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 32768),
            rope=Rope.from_hf(hf, 2_000_000.0),
            rotated=rotated,
            windows=_windows(hf, rotated),
            eps=hf.get("rms_norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings") is not False,
            attention_bias=bool(hf.get("attention_bias")),
            mlp_bias=bool(hf.get("mlp_bias")),
        )


def _rotated(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """By no_rope_layers, which has a 1 for each layer with rope, else all but every no_rope_layer_interval-th."""
    layers, interval = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    given = hf.get("no_rope_layers")
    if given is None:
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if len(given) < layers or not set(given) <= {0, 1}:
        raise ConfigError(f"config.json has no_rope_layers={given!r}; served are {layers} or more of 0 and 1")
    return tuple(bool(g) for g in given[:layers])


def _windows(hf: Mapping[str, Any], rotated: tuple[bool, ...]) -> tuple[int | None, ...]:
    """By layer_types, else a window on the layers without rope where use_sliding_window says so."""
    window = hf.get("sliding_window")
    if hf.get("layer_types"):
        sliding = sliding_layers(hf, 1)
        if any(sliding) and window is None:
            raise ConfigError("config.json has sliding_attention in layer_types and no sliding_window")
    else:
        sliding = tuple(bool(hf.get("use_sliding_window")) and not rope for rope in rotated)
    return tuple(window if slides else None for slides in sliding)


def param_specs(c: Config) -> dict[str, Any]:
    w, m = partial(weight, c), partial(matrix, c)  # axis names are the config's fields

    def block(hf: str) -> dict[str, Any]:
        attention_biases = {
            "q_bias": w("heads head_dim", f"{hf}.self_attn.q_proj.bias"),
            "k_bias": w("kv_heads head_dim", f"{hf}.self_attn.k_proj.bias"),
            "v_bias": w("kv_heads head_dim", f"{hf}.self_attn.v_proj.bias"),
            "o_bias": w("width", f"{hf}.self_attn.o_proj.bias"),
        }
        mlp_biases = {
            "gate_bias": w("ffn", f"{hf}.mlp.gate_proj.bias"),
            "up_bias": w("ffn", f"{hf}.mlp.up_proj.bias"),
            "down_bias": w("width", f"{hf}.mlp.down_proj.bias"),
        }
        return {
            "attn_norm": w("width", f"{hf}.input_layernorm.weight"),
            "q": m("heads head_dim width", f"{hf}.self_attn.q_proj.weight"),
            "k": m("kv_heads head_dim width", f"{hf}.self_attn.k_proj.weight"),
            "v": m("kv_heads head_dim width", f"{hf}.self_attn.v_proj.weight"),
            "o": m("width heads head_dim", f"{hf}.self_attn.o_proj.weight"),
            **(attention_biases if c.attention_bias else {}),
            "mlp_norm": w("width", f"{hf}.post_attention_layernorm.weight"),
            "gate": m("ffn width", f"{hf}.mlp.gate_proj.weight"),
            "up": m("ffn width", f"{hf}.mlp.up_proj.weight"),
            "down": m("width ffn", f"{hf}.mlp.down_proj.weight"),
            **(mlp_biases if c.mlp_bias else {}),
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
    q = project(p, "q", h, out=2)  # [T, N, H]
    k = project(p, "k", h, out=2)  # [T, K, H]
    if c.rotated[layer]:
        q, k = rotate(q, positions, c.rope), rotate(k, positions, c.rope)
    v = project(p, "v", h, out=2)  # [T, K, H]
    o, cache = attend(layer, q, k, v, cache, window=c.windows[layer])  # [T, N, H]
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
