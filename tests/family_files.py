"""Small random checkpoints of the families that are Llama with one thing more, the same wherever they are made."""

from pathlib import Path
from typing import Any

import gemma_files

_SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "num_hidden_layers": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
    "hidden_act": "silu", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_LISTS = {
    "short_factor": [1.0, 1.0625, 1.25, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.5, 9.0],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope"} | _LISTS, "tie_word_embeddings": True,
    },
    # llama.cpp is given 512 positions, which do not exceed the original ones.
    "phi3_short": {
        "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 512, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "su"} | _LISTS, "max_position_embeddings": 4096,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "granite": {
        "architectures": ["GraniteForCausalLM"], "embedding_multiplier": 3.0, "attention_multiplier": 0.375,
        "residual_multiplier": 0.625, "logits_scaling": 0.5, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 5, "tie_word_embeddings": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
}  # fmt: skip


def write_checkpoint(path: Path, name: str) -> str:
    """As gemma_files' for one of CONFIGS here."""
    return gemma_files.write_model(path, _SIZES | CONFIGS[name], shapes, norm=1.0)


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a config.json of one of these families."""
    width, ffn, architecture = c["hidden_size"], c["intermediate_size"], c["architectures"][0]
    kv = width // c["num_attention_heads"] * c["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    found["model.norm.weight"] = (width,)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], width)
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }  # fmt: skip
    if architecture == "Phi3ForCausalLM":
        block = {"self_attn.qkv_proj": (width + 2 * kv, width), "self_attn.o_proj": (width, width)}
        block |= {"mlp.gate_up_proj": (2 * ffn, width), "mlp.down_proj": (width, ffn)}
    biases = {f"{part}.bias": shape[:1] for part, shape in block.items()} if c.get("attention_bias") else {}
    if architecture == "Olmo2ForCausalLM":
        block |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (kv,)}
        block |= {"post_attention_layernorm": (width,), "post_feedforward_layernorm": (width,)}
    else:
        block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    block = {f"{part}.weight": shape for part, shape in block.items()} | biases
    for i in range(c["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return found
