"""BERT in a GGUF file: Hugging Face's names of its tensors, and what its config.json has besides."""

import re
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.gguf import GgufFile

_TYPES, _POSITIONS = "token_types.weight", "position_embd.weight"
_TOP_NAMES = {
    "token_embd.weight": "embeddings.word_embeddings.weight",
    _POSITIONS: "embeddings.position_embeddings.weight",
    _TYPES: "embeddings.token_type_embeddings.weight",
    "token_embd_norm.weight": "embeddings.LayerNorm.weight",
    "token_embd_norm.bias": "embeddings.LayerNorm.bias",
}
_LAYER_NAMES = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")


def hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; its own where there is none."""
    part = _LAYER.fullmatch(name)
    if part is None or part[2] not in _LAYER_NAMES:
        return _TOP_NAMES.get(name, name)
    return f"encoder.layer.{part[1]}.{_LAYER_NAMES[part[2]]}.{part[3]}"


def config(file: GgufFile, eps: float) -> dict[str, Any]:
    """What BERT's config.json has besides the sizes that every model has. Raises ConfigError for a lack."""
    for name in (_TYPES, _POSITIONS):
        if name not in file.tensors or len(file.tensors[name].shape) != 2:
            raise ConfigError(f"{file.path}: holds no matrix {name}, so it is not a whole BERT")
    return {
        "hidden_act": "gelu",
        "layer_norm_eps": eps,
        "type_vocab_size": file.tensors[_TYPES].shape[0],
        "max_position_embeddings": file.tensors[_POSITIONS].shape[0],
    }
