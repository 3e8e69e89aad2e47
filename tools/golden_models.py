"""The tiny models that golden.py makes checkpoints of: their shapes, their files and the mistakes they must expose."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Golden:
    """One checkpoint: its shape, its files and the mistakes it must expose."""

    name: str
    model_type: str
    seed: int
    prompt_tokens: int
    config: dict
    dtype: torch.dtype = torch.float32
    shard_bytes: int | None = None
    classic: dict = field(default_factory=dict)
    """Keys that config.classic.json has on top of, or instead of, the plain conversion."""
    classic_lacks: tuple[str, ...] = ()
    """Keys that config.classic.json leaves to their defaults."""
    mistakes: dict[str, dict] = field(default_factory=dict)
    """Config changes, by name, that must change the logits."""


def rope(theta: float, rope_type: str = "default", **scaling) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


def ropes(theta: float, local_theta: float, rope_type: str = "default", **scaling) -> dict:
    """Gemma 3's: one for its global layers, the only ones that are scaled, and one for its local ones."""
    full, local = rope(theta, rope_type, **scaling), rope(local_theta)
    kinds = {"full_attention": full["rope_parameters"], "sliding_attention": local["rope_parameters"]}
    return {"rope_parameters": kinds}


def shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **rest) -> dict:
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    sizes = dict(zip(names.split(), (hidden, ffn, layers, heads, kv_heads, vocab), strict=True))
    return {"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, **sizes, **rest}


# Wavelengths of head_dim 16 and theta 500 are 6, 14, 30, 65, ...: with 32 original positions the first is kept, the
# next two are blended and the rest divided.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# Six pairs of dimensions rotate: all of head_dim 12, or three quarters of 16.
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.25, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.5, 9.0],
}

# Of the eight pairs of a rope of 16 dimensions with theta 500 two are kept, the next is blended and the rest divided.
YARN = {"factor": 8.0, "beta_fast": 2.0, "beta_slow": 0.5, "original_max_position_embeddings": 32}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.2}
# Multi-head latent attention: heads of 12 + 16 queries and 10 values, from latents of 20 + 16.
LATENT = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 16, "v_head_dim": 10, "kv_lora_rank": 20}

GOLDENS = [
    Golden(
        "llama2",
        "llama",
        seed=1,
        prompt_tokens=40,
        config=shape(48, 64, 2, heads=4, kv_heads=4, vocab=163, rms_norm_eps=1e-5) | rope(10000.0),
        # The first Llama configs had none of these.
        classic_lacks=("num_key_value_heads", "head_dim", "rope_theta", "attention_bias", "mlp_bias"),
        mistakes={"theta": rope(500.0)},
    ),
    Golden(
        "llama3",
        "llama",
        seed=2,
        prompt_tokens=60,
        config=shape(64, 72, 2, heads=4, kv_heads=2, vocab=176, tie_word_embeddings=True, rms_norm_eps=1e-5)
        | rope(500.0, "llama3", **LLAMA3)
        | {"eos_token_id": [2, 5]},
        classic_lacks=("head_dim",),
        mistakes={
            "unscaled": rope(500.0),
            "linear": rope(500.0, "linear", factor=8.0),
            "low_freq_factor": rope(500.0, "llama3", **LLAMA3 | {"low_freq_factor": 2.0}),
            "high_freq_factor": rope(500.0, "llama3", **LLAMA3 | {"high_freq_factor": 2.0}),
            "original_positions": rope(500.0, "llama3", **LLAMA3 | {"original_max_position_embeddings": 64}),
        },
    ),
    Golden(
        "llama_bias",
        "llama",
        seed=3,
        prompt_tokens=40,
        config=shape(48, 80, 2, heads=6, kv_heads=2, vocab=160, head_dim=12, rms_norm_eps=1e-3)
        | {"attention_bias": True, "mlp_bias": True}
        | rope(10000.0),
        mistakes={"eps": {"rms_norm_eps": 1e-6}},
    ),
    Golden(
        "linear",
        "llama",
        seed=4,
        prompt_tokens=40,
        config=shape(48, 64, 2, heads=4, kv_heads=1, vocab=168, tie_word_embeddings=True, rms_norm_eps=1e-6)
        | rope(10000.0, "linear", factor=4.0),
        classic={"rope_scaling": {"type": "linear", "factor": 4.0}},  # the key's name before it was `rope_type`
        classic_lacks=("head_dim", "rope_theta"),
        mistakes={"unscaled": rope(10000.0), "factor": rope(10000.0, "linear", factor=2.0)},
    ),
    Golden(
        "mistral",
        "mistral",
        seed=5,
        prompt_tokens=60,
        config=shape(56, 48, 3, heads=7, kv_heads=1, vocab=160, head_dim=10, sliding_window=9, rms_norm_eps=1e-5)
        | rope(10000.0),
        mistakes={"no window": {"sliding_window": None}, **{f"window {w}": {"sliding_window": w} for w in (8, 10)}},
    ),
    Golden(
        "qwen2",
        "qwen2",
        seed=6,
        prompt_tokens=40,
        config=shape(56, 72, 2, heads=4, kv_heads=2, vocab=176, tie_word_embeddings=True, rms_norm_eps=1e-6)
        | rope(1000000.0),
        # Qwen 2.5 publishes a window and says not to use it.
        classic={"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        classic_lacks=("layer_types",),
        mistakes={"theta": rope(10000.0)},
    ),
    Golden(
        "qwen2_window",
        "qwen2",
        seed=7,
        prompt_tokens=48,
        config=shape(48, 64, 3, heads=4, kv_heads=2, vocab=160, tie_word_embeddings=True, rms_norm_eps=1e-6)
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        | rope(10000.0),
        classic_lacks=("layer_types",),
        mistakes={
            "no window": {"use_sliding_window": False},
            "all layers": {"max_window_layers": 0},
            "one layer": {"max_window_layers": 2},
            "first layers": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            **{f"window {w}": {"sliding_window": w} for w in (7, 9)},
        },
    ),
    Golden(
        "qwen3",
        "qwen3",
        seed=8,
        prompt_tokens=40,
        config=shape(48, 64, 2, heads=4, kv_heads=2, vocab=160, head_dim=16, rms_norm_eps=1e-6) | rope(1000000.0),
        shard_bytes=60_000,
        classic={"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
        classic_lacks=("layer_types",),
        mistakes={"theta": rope(10000.0)},
    ),
    Golden(
        "llama_bf16",
        "llama",
        seed=9,
        prompt_tokens=40,
        config=shape(64, 80, 2, heads=4, kv_heads=2, vocab=208, rms_norm_eps=1e-5) | rope(500000.0),
        dtype=torch.bfloat16,
        classic_lacks=("head_dim",),
        mistakes={"theta": rope(10000.0)},
    ),
    Golden(
        "qwen3_f16",
        "qwen3",
        seed=10,
        prompt_tokens=40,
        config=shape(48, 80, 2, heads=6, kv_heads=2, vocab=176, head_dim=16, tie_word_embeddings=True)
        | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 7, "rms_norm_eps": 1e-6}
        # Against max_window_layers, which says that no layer has a window: layer_types has the last word.
        | {"max_window_layers": 28, "layer_types": ["sliding_attention", "full_attention"]}
        | rope(1000000.0),
        dtype=torch.float16,
        mistakes={
            "no window": {"layer_types": ["full_attention"] * 2},
            "other layer": {"layer_types": ["full_attention", "sliding_attention"]},
            **{f"window {w}": {"sliding_window": w} for w in (6, 8)},
        },
    ),
    Golden(
        "gemma2",
        "gemma2",
        seed=11,
        prompt_tokens=48,
        config=shape(48, 64, 3, heads=4, kv_heads=2, vocab=168, head_dim=10, sliding_window=8, rms_norm_eps=1e-6)
        | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 2.0}
        | rope(10000.0),
        classic={"hidden_act": "gelu_pytorch_tanh"},
        classic_lacks=("layer_types", "tie_word_embeddings", "use_bidirectional_attention"),
        mistakes={
            "score cap": {"attn_logit_softcapping": None},
            "logit cap": {"final_logit_softcapping": None},
            "scale": {"query_pre_attn_scalar": 10},
            "gelu": {"hidden_activation": "silu"},
            "other layers": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            **{f"window {w}": {"sliding_window": w} for w in (7, 9)},
        },
    ),
    Golden(
        "gemma3",
        "gemma3_text",
        seed=12,
        prompt_tokens=48,
        config=shape(40, 48, 7, heads=4, kv_heads=1, vocab=176, head_dim=12, sliding_window=9, rms_norm_eps=1e-6)
        | {"query_pre_attn_scalar": 20}
        | ropes(5000.0, 100.0, "linear", factor=8.0),
        dtype=torch.bfloat16,
        classic={"sliding_window_pattern": 6},
        classic_lacks=("layer_types", "tie_word_embeddings", "use_bidirectional_attention"),
        mistakes={
            "one rope": ropes(5000.0, 5000.0, "linear", factor=8.0),
            "unscaled": ropes(5000.0, 100.0),
            "theta": ropes(10000.0, 100.0, "linear", factor=8.0),
            "scale": {"query_pre_attn_scalar": 12},
            "all local": {"layer_types": ["sliding_attention"] * 7},
            "other layer": {"layer_types": [*["sliding_attention"] * 6, "full_attention"]},
            **{f"window {w}": {"sliding_window": w} for w in (8, 10)},
        },
    ),
    Golden(
        "gemma3_untied",
        "gemma3_text",
        seed=13,
        prompt_tokens=40,
        config=shape(48, 64, 3, heads=4, kv_heads=2, vocab=160, head_dim=12, sliding_window=7, rms_norm_eps=1e-6)
        | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 4.0, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        | ropes(1000000.0, 10000.0),
        classic={"rope_scaling": None},
        classic_lacks=("rope_theta", "rope_local_base_freq"),
        mistakes={
            "logit cap": {"final_logit_softcapping": None},
            "one rope": ropes(1000000.0, 1000000.0),
            "all local": {"layer_types": ["sliding_attention"] * 3},
        },
    ),
    Golden(
        "phi3",
        "phi3",
        seed=14,
        prompt_tokens=40,
        # As long as the original context, so that the short list counts; the factor alone says how far it is stretched.
        config=shape(64, 72, 2, heads=4, kv_heads=2, vocab=176, tie_word_embeddings=True, rms_norm_eps=1e-5)
        | {"max_position_embeddings": 64, "original_max_position_embeddings": 64, "pad_token_id": 0}
        | rope(100.0, "longrope", factor=16.0, partial_rotary_factor=0.75, **LONGROPE),
        classic={
            "rope_scaling": {"type": "longrope", "factor": 16.0} | LONGROPE,
            "partial_rotary_factor": 0.75,
        },
        mistakes={
            "unscaled": rope(100.0, partial_rotary_factor=0.75),
            "magnitude": rope(100.0, "longrope", attention_factor=1.0, partial_rotary_factor=0.75, **LONGROPE),
            "long list": rope(
                100.0,
                "longrope",
                factor=16.0,
                partial_rotary_factor=0.75,
                **LONGROPE | {"short_factor": LONGROPE["long_factor"]},
            ),
            "whole head": rope(100.0),
        },
    ),
    Golden(
        "phi3_long",
        "phi3",
        seed=15,
        prompt_tokens=60,
        config=shape(48, 64, 2, heads=4, kv_heads=4, vocab=168, sliding_window=9, rms_norm_eps=1e-5)
        | {"original_max_position_embeddings": 32, "pad_token_id": 0}
        | rope(10000.0, "longrope", **LONGROPE),
        dtype=torch.bfloat16,
        classic={"rope_scaling": {"type": "su", "original_max_position_embeddings": 32} | LONGROPE},  # its first name
        classic_lacks=("num_key_value_heads",),
        mistakes={
            "unscaled": rope(10000.0),
            "magnitude": rope(10000.0, "longrope", attention_factor=1.0, **LONGROPE),
            "short list": rope(10000.0, "longrope", **LONGROPE | {"long_factor": LONGROPE["short_factor"]}),
            "no window": {"sliding_window": None},
            **{f"window {w}": {"sliding_window": w} for w in (8, 10)},
        },
    ),
    Golden(
        "olmo2",
        "olmo2",
        seed=16,
        prompt_tokens=40,
        config=shape(48, 64, 2, heads=6, kv_heads=2, vocab=168, rms_norm_eps=1e-3, pad_token_id=0) | rope(500000.0),
        mistakes={"theta": rope(10000.0), "eps": {"rms_norm_eps": 1e-6}},
    ),
    Golden(
        "granite",
        "granite",
        seed=17,
        prompt_tokens=40,
        config=shape(48, 64, 2, heads=4, kv_heads=2, vocab=168, rms_norm_eps=1e-5)
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.15, "residual_multiplier": 0.6, "logits_scaling": 0.5}
        | {"attention_bias": True, "mlp_bias": True, "pad_token_id": 0}
        | rope(10000.0),
        mistakes={
            key: {key: 1.0}
            for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        }
        | {"usual scale": {"attention_multiplier": 12**-0.5}},
    ),
    Golden(
        "smollm3",
        "smollm3",
        seed=18,
        prompt_tokens=48,
        config=shape(48, 64, 4, heads=4, kv_heads=2, vocab=168, tie_word_embeddings=True, rms_norm_eps=1e-6)
        | {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 9, "pad_token_id": 0}
        | rope(2000000.0),
        classic_lacks=("no_rope_layers", "layer_types", "tie_word_embeddings", "rope_theta", "attention_bias"),
        mistakes={
            "rope in all": {
                "no_rope_layers": [1] * 4,
                "layer_types": ["full_attention"] * 2 + ["sliding_attention", "full_attention"],
            },
            "other layers": {"no_rope_layers": [1, 0, 1, 1]},
            "no window": {"layer_types": ["full_attention"] * 4},
            **{f"window {w}": {"sliding_window": w} for w in (8, 10)},
        },
    ),
    Golden(
        "mixtral",
        "mixtral",
        seed=14,
        prompt_tokens=40,
        config=shape(48, 40, 2, heads=4, kv_heads=2, vocab=160, sliding_window=9, rms_norm_eps=1e-5)
        | {"num_local_experts": 5, "num_experts_per_tok": 2}
        | rope(10000.0),
        classic_lacks=("head_dim",),
        mistakes={
            "one expert": {"num_experts_per_tok": 1},
            "three experts": {"num_experts_per_tok": 3},
            "no window": {"sliding_window": None},
        },
    ),
    Golden(
        "qwen3_moe",
        "qwen3_moe",
        seed=15,
        prompt_tokens=40,
        config=shape(48, 56, 3, heads=4, kv_heads=2, vocab=160, head_dim=16, rms_norm_eps=1e-6)
        | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
        | {"mlp_only_layers": [1]}
        | rope(10000.0),
        dtype=torch.bfloat16,
        classic={"num_experts": 8},  # the key's name before it was Mixtral's
        classic_lacks=("num_local_experts",),
        mistakes={
            "two experts": {"num_experts_per_tok": 2},
            "weights not normalised": {"norm_topk_prob": False},
            "theta": rope(500.0),
        },
    ),
    Golden(
        "qwen3_moe_step",
        "qwen3_moe",
        seed=19,
        prompt_tokens=40,
        config=shape(40, 48, 2, heads=4, kv_heads=1, vocab=168, tie_word_embeddings=True, rms_norm_eps=1e-6)
        | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": False}
        | {"attention_bias": True, "decoder_sparse_step": 2}
        | rope(10000.0),
        classic_lacks=("norm_topk_prob", "mlp_only_layers"),
        mistakes={
            "one expert": {"num_experts_per_tok": 1},
            "weights normalised": {"norm_topk_prob": True},
            "theta": rope(500.0),
        },
    ),
    Golden(
        "deepseek_v2",
        "deepseek_v2",
        seed=20,
        prompt_tokens=40,
        config=shape(48, 56, 3, heads=4, kv_heads=4, vocab=160, rms_norm_eps=1e-3)
        | LATENT
        | {"q_lora_rank": 24, "first_k_dense_replace": 1, "n_shared_experts": 2, "moe_intermediate_size": 24}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | rope(500.0, "yarn", **YARN, **MSCALE),
        dtype=torch.bfloat16,
        classic={"rope_scaling": {"type": "yarn"} | YARN | MSCALE},
        classic_lacks=("head_dim", "attention_bias", "mlp_bias"),
        mistakes={
            "any group": {"topk_method": "greedy"},
            "three groups": {"topk_group": 3},
            "two experts": {"num_experts_per_tok": 2},
            "experts not scaled": {"routed_scaling_factor": 1.0},
            "unscaled": rope(500.0),
            "no mscale": rope(500.0, "yarn", **YARN),
            **{
                key: rope(500.0, "yarn", **YARN | MSCALE | {key: value})
                for key, value in {
                    "factor": 4.0,
                    "beta_fast": 32.0,
                    "beta_slow": 0.25,
                    "original_max_position_embeddings": 64,
                    "mscale": 1.2,
                    "mscale_all_dim": 0.7,
                }.items()
            },
        },
    ),
    Golden(
        "deepseek_v2_lite",
        "deepseek_v2",
        seed=21,
        prompt_tokens=40,
        config=shape(48, 56, 2, heads=6, kv_heads=6, vocab=168, rms_norm_eps=1e-6)
        | LATENT
        | {"q_lora_rank": None, "first_k_dense_replace": 1, "n_shared_experts": 1, "moe_intermediate_size": 32}
        | {"n_routed_experts": 6, "num_experts_per_tok": 2}
        | rope(10000.0),
        dtype=torch.bfloat16,
        # Keys of DeepSeek's own code.
        classic={"scoring_func": "softmax", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True},
        classic_lacks=("head_dim", "topk_method", "routed_scaling_factor"),
        mistakes={
            "one expert": {"num_experts_per_tok": 1},
            "theta": rope(500.0),
        },
    ),
]
