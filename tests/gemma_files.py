"""Small random Gemma checkpoints in Hugging Face's layout, the same wherever they are made, and their vocabulary."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf_blocks import random_uniform
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2 as proto

_SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 96,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "sliding_window": 12, "query_pre_attn_scalar": 24,
    "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 3, "rope_theta": 10000.0,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7, "sliding_window_pattern": 6,
        "rope_theta": 5000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    # What llama.cpp takes from keys that the published models do without.
    "gemma3_keys": {
        "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 3, "final_logit_softcapping": 2.0,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "tie_word_embeddings": False,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
}  # fmt: skip
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
_WORDS = ["<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁", "<table>"]
_PIECES = ["▁", *"abcdelnotw.", "▁a", "▁t", "on", "▁to", "ed", "new", "▁new", "▁▁a"]
_KIND = proto.ModelProto.SentencePiece


def write_checkpoint(path: Path, name: str) -> str:
    """A directory with config.json, model.safetensors (float32) and tokenizer.model, of one of CONFIGS.

    Returns the sha256 of its tensors' bytes, in order.
    """
    return write_model(path, _SIZES | CONFIGS[name], _shapes, norm=0.0)


def write_model(
    path: Path, config: dict[str, Any], shapes: Callable[[dict[str, Any]], Mapping[str, Any]], *, norm: float
) -> str:
    """The same of any config.json. `shapes` gives its tensors once vocab_size is in it, `norm` is the mean of norms."""
    path.mkdir()
    model = _tokenizer()
    (path / "tokenizer.model").write_bytes(model.SerializeToString())
    added = {i: {"content": p.piece, "special": i < 6} for i, p in enumerate(model.pieces) if i < 10}
    named = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), CONTROL, strict=True))
    settings = named | {"add_bos_token": True, "added_tokens_decoder": added}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"vocab_size": len(model.pieces) + 5} | config  # padded, as many are
    (path / "config.json").write_text(json.dumps(config))
    weights, digest = {}, hashlib.sha256()
    for i, (tensor, shape) in enumerate(shapes(config).items()):
        spread = 2 * random_uniform(int(np.prod(shape)), 1000 + i).reshape(shape) - 1
        scale = 0.5 if "norm" in tensor else 0.2 if "embed" in tensor else 0.35
        weights[tensor] = (scale * spread + (norm if "norm" in tensor else 0.0)).astype("<f4")
        digest.update(weights[tensor].tobytes())
    save_file(weights, path / "model.safetensors")
    return digest.hexdigest()


def _tokenizer() -> Any:
    """As Gemma's: no space before a text, runs of spaces and markup as words, bytes for what is unknown."""
    model = proto.ModelProto()

    def add(texts: Any, kind: int, score: Any = lambda i: 0.0) -> None:
        for i, text in enumerate(texts):
            model.pieces.add(piece=text, score=score(i), type=kind)

    add(CONTROL[:3], _KIND.CONTROL)
    add(CONTROL[3:], _KIND.UNKNOWN)
    add(_WORDS, _KIND.USER_DEFINED)
    add((f"<0x{byte:02X}>" for byte in range(256)), _KIND.BYTE)
    add(_PIECES, _KIND.NORMAL, lambda i: -float(i))
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    for name, piece in zip(("pad", "eos", "bos", "unk"), CONTROL, strict=True):
        setattr(model.trainer_spec, f"{name}_piece", piece)
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model


def _shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, ffn, q = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if c.get("tie_word_embeddings") is False:
        found["lm_head.weight"] = (c["vocab_size"], width)
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for i in range(c["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, q), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn), **{f"{norm}_layernorm": (width,) for norm in norms},
        }  # fmt: skip
        if c["architectures"] == ["Gemma3ForCausalLM"]:
            block |= {"self_attn.q_norm": (c["head_dim"],), "self_attn.k_norm": (c["head_dim"],)}
        found |= {f"model.layers.{i}.{part}.weight": shape for part, shape in block.items()}
    return found
