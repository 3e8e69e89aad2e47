"""A GGUF file as a checkpoint: Hugging Face's tensor names, row order and config.json, made from what the file says."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.embedding import POOLING_TYPE
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.formats import Blocks, dequantise
from jaxserve.gguf import GgufFile, TensorInfo
from jaxserve.request import PoolingKind
from jaxserve.weights import gguf_bert

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""general.architecture to the name that jaxserve.models knows; `llama` with experts is Mixtral, with a sliding window
alone Mistral."""
ENCODERS = {"bert": "BertModel"}
"""The same of those that give embeddings only; see gguf_bert.py."""

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Under blk.N and model.layers.N, before .weight or .bias. A `*` stands for a tensor's place in a stack."""
_MIXTRAL_NAMES = LAYER_NAMES | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
_QWEN3_MOE_NAMES = LAYER_NAMES | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OLMO2_NAMES = {name: hf for name, hf in _GEMMA_NAMES.items() if name not in ("attn_norm", "ffn_norm")}
_PHI3_NAMES = LAYER_NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_NAMES = {
    "gemma2": _GEMMA_NAMES, "gemma3": _GEMMA_NAMES, "olmo2": _OLMO2_NAMES, "phi3": _PHI3_NAMES,
    "llama": _MIXTRAL_NAMES, "qwen3moe": _QWEN3_MOE_NAMES,
}  # fmt: skip

GEMMA = {"gemma2": 2, "gemma3": 6}
"""Gemma's architectures: every how manyth layer has no sliding window where the file does not say. Their norm weights
are stored with the 1 added that the models add."""
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers

ROPE_FREQS = "rope_freqs.weight"
"""Llama 3's scaling: what each rotary frequency is divided by."""
ROPE_LISTS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
"""The same of Phi-3, by its names."""

INTERLEAVED = ("llama", "granite", "smollm3")
"""Architectures that store those rows of a q or k head side by side that rotate together."""
_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")
POOLING_TYPES: dict[int, PoolingKind | None] = {0: None, 1: "mean", 2: "cls", 3: "last"}
"""llama.cpp's numbers."""
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CHUNK = 2**20  # weights that are dequantised at a time: what that needs besides its result stays in the cache
# Keys of an architecture that change nothing here: a size that the tensors tell too, the epsilon of a norm that the
# architecture has not, how rope scaling came about.
_IDLE = (
    "vocab_size",
    "attention.layer_norm_epsilon",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)


@dataclass(frozen=True)
class _Source:
    """Where one of Hugging Face's tensors is: a tensor of the file, or one of the matrices that it stacks."""

    name: str
    info: TensorInfo
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape if self.index is None else self.info.shape[1:]

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many equal parts of the tensor."""
        return (0, 1) if self.index is None else (self.index, self.info.shape[0])

    def rows(self, raw: np.ndarray) -> np.ndarray:
        """Its own of all the tensor's."""
        return raw if self.index is None else raw.reshape(self.info.shape[0], -1, raw.shape[1])[self.index]


class GgufCheckpoint:
    """jaxserve.weights.Checkpoint over one GGUF file or split. A stack of experts is as many tensors.

    Tensors that no name of Hugging Face's belongs to keep their own, so that whoever asks for names meets them.
    """

    def __init__(self, path: Path):
        """Raises CheckpointError for a damaged file, ConfigError for a model that is not served, naming the key."""
        self.path = path
        self.file = GgufFile(path)
        self.config = make_config(self.file)
        self._sources: dict[str, _Source] = {}
        self._architecture = self.file.metadata["general.architecture"]
        in_config = {"llama": (ROPE_FREQS,), "phi3": tuple(ROPE_LISTS.values())}.get(self._architecture, ())
        for name, info in self.file.tensors.items():
            if name in in_config:
                continue
            hf = hf_name(name, self._architecture)
            found = {hf: _Source(name, info)}
            if "*" in hf:
                if len(info.shape) != 3:
                    raise CheckpointError(f"{path}: {name} is {list(info.shape)}, not a stack of matrices")
                found = {hf.replace("*", str(i)): _Source(name, info, i) for i in range(info.shape[0])}
            for hf, source in found.items():
                if hf in self._sources:
                    raise CheckpointError(f"{path}: tensors {self._sources[hf].name!r} and {name!r} are both {hf}")
                self._sources[hf] = source

    def names(self) -> frozenset[str]:
        return frozenset(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._sources[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives: float32 for a quantised tensor, and for a norm with its 1 added."""
        if self._one_added(name):
            return np.dtype(np.float32)
        return _DTYPES.get(self._sources[name].info.format.name, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """A tensor of plain numbers as it is, a quantised one dequantised to float32."""
        source, order = self._sources[name], self._row_order(name)
        info, raw = source.info, source.rows(self.file.raw(source.name))
        if not info.format.quantised:
            dense = raw.reshape(-1).view(_DTYPES[info.format.name]).reshape(source.shape)
            if self._one_added(name):
                return dense.astype(np.float32) - np.float32(1)
            return dense if order is None else dense[order]
        out = np.empty((len(raw), info.shape[-1]), np.float32)
        step = max(1, _CHUNK // info.shape[-1])
        with np.errstate(all="ignore"):  # a damaged scale gives weights that are no numbers, as in any other file
            for begin in range(0, len(raw), step):
                rows = slice(begin, begin + step)
                out[rows] = dequantise(info.format, raw[rows if order is None else order[rows]])
        return out.reshape(source.shape)

    def blocks(self, name: str) -> Blocks | None:
        """A quantised tensor as it is stored; None for any other.

        The rows are a read-only view of the map, or an array of their own where their order had to change.
        """
        source, order = self._sources[name], self._row_order(name)
        if not source.info.format.quantised:
            return None
        raw = source.rows(self.file.raw(source.name))
        return Blocks(source.info.format, raw if order is None else raw[order])

    def release(self, name: str) -> None:
        source = self._sources[name]
        self.file.release(source.name, source.part)

    def nbytes(self, name: str) -> int:
        return self._sources[name].info.nbytes // self._sources[name].part[1]

    def _one_added(self, name: str) -> bool:
        return self.config["model_type"] in GEMMA and name.endswith("norm.weight")

    def _row_order(self, name: str) -> np.ndarray | None:
        """Which stored row is each row of `name`; None where they agree."""
        source, head_dim = self._sources[name].name, self.config["head_dim"]
        part = _LAYER.fullmatch(source)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part[2] if part else "")
        if heads is None or self._architecture not in INTERLEAVED:
            return None
        rows, count = self.shape(name)[0], self.config[heads]
        if rows != count * head_dim:
            raise CheckpointError(f"{self.path}: {source} has {rows} rows for {count} heads of {head_dim}")
        return halves_from_pairs(count, head_dim)


def layer_names(architecture: str) -> dict[str, str]:
    """LAYER_NAMES of one architecture."""
    return _NAMES.get(architecture, LAYER_NAMES)


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a GGUF tensor; its own where there is none."""
    if architecture in ENCODERS:
        return gguf_bert.hf_name(name)
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    part, names = _LAYER.fullmatch(name), layer_names(architecture)
    if part is None or part[2] not in names:
        return name
    return f"model.layers.{part[1]}.{names[part[2]]}.{part[3]}"


def halves_from_pairs(heads: int, head_dim: int) -> np.ndarray:
    """Of each row of a q or k whose heads rotate (i, i + H/2), its place where they are INTERLEAVED: int [heads * H].

    There a head's rows are interleaved, so that the pairs that rotate together are neighbours. argsort is the way back.
    """
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def make_config(file: GgufFile) -> dict[str, Any]:
    """What config.json would hold. Raises ConfigError for an architecture or a key of it that is not served."""
    kind = file.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ConfigError(f"{file.path}: a GGUF of type {kind!r}, not a model")
    architecture = file.metadata.get("general.architecture")
    served = ARCHITECTURES | ENCODERS
    if not isinstance(architecture, str) or architecture not in served:
        raise ConfigError(f"{file.path}: architecture {architecture!r} is not served; served are {', '.join(served)}")
    keys = _Keys(file, architecture)
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise ConfigError(f"{file.path}: holds no matrix token_embd.weight, so it is not a whole model")
    width, heads, layers = keys.whole("embedding_length"), keys.whole("attention.head_count"), keys.whole("block_count")
    if layers > len(file.tensors):
        raise ConfigError(f"{file.path}: {architecture}.block_count is {layers}, the tensors are {len(file.tensors)}")
    head_dim = keys.whole("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(key, head_dim) != head_dim and (architecture, key) != ("phi3", "rope.dimension_count"):
            raise keys.refused(key, f"head_dim {head_dim}")
    if head_dim % 2:
        raise keys.refused("attention.key_length", "an even one")
    causal = architecture not in ENCODERS
    if keys.take("attention.causal", causal) is not causal:
        raise keys.refused("attention.causal", str(causal))
    pooling = keys.take("pooling_type", 0)
    if type(pooling) is not int or pooling not in POOLING_TYPES:
        raise keys.refused("pooling_type", ", ".join(f"{i} ({kind or 'none'})" for i, kind in POOLING_TYPES.items()))
    config: dict[str, Any] = {
        "architectures": [served[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": embed.shape[0],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.whole("feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
    }
    if (kind := POOLING_TYPES[pooling]) is not None:
        config[POOLING_TYPE] = kind
    if not causal:
        config |= gguf_bert.config(file, keys.number("attention.layer_norm_epsilon"))
        keys.all_taken()
        return config
    config |= {
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_scaling": None if architecture == "phi3" else _rope_scaling(keys),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": _has_biases(file, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _has_biases(file, "ffn_gate", "ffn_up", "ffn_down"),
    }
    if architecture == "llama":
        window, experts = keys.whole("attention.sliding_window", 0), keys.whole("expert_count", 0)
        if window and not experts:
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
        if experts:
            config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"} | _experts(keys, experts)
            config["sliding_window"] = window or None
        if ROPE_FREQS in file.tensors:
            if config["rope_scaling"] is not None:
                raise ConfigError(f"{file.path}: both {ROPE_FREQS} and linear rope scaling; served is one of them")
            config["rope_scaling"] = _llama3_scaling(file, config)
    if architecture == "qwen3moe":
        config |= _experts(keys, keys.whole("expert_count"))
        share = config["intermediate_size"] // config["num_experts_per_tok"] or None
        config["moe_intermediate_size"] = keys.whole("expert_feed_forward_length", share)
    if architecture in GEMMA:
        config |= _gemma(keys, architecture, config)
    if architecture == "phi3":
        config |= _phi3(keys, config)
    if architecture == "granite":
        config |= _granite(keys, config)
    keys.all_taken()
    return config


def _experts(keys: "_Keys", count: int) -> dict[str, Any]:
    """What both architectures with experts say of them; that weights are normalised neither can deny."""
    return {
        "num_local_experts": count,
        "num_experts_per_tok": keys.whole("expert_used_count"),
        "norm_topk_prob": True,
    }


def _gemma(keys: "_Keys", architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma's configs have besides, and what llama.cpp takes where a file does not say."""
    layers, second = config["num_hidden_layers"], architecture == "gemma2"
    window = keys.whole("attention.sliding_window", 4096 if second else 0)
    pattern = keys.take("attention.sliding_window_pattern", GEMMA[architecture])
    if isinstance(pattern, np.ndarray) and pattern.shape == (layers,) and pattern.dtype.kind in "biu":
        sliding = [bool(s) for s in pattern]
    elif type(pattern) is int and pattern > 0:
        sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    else:
        raise keys.refused("attention.sliding_window_pattern", f"a number above 0 or {layers} of true and false")
    local_theta = keys.number("rope.freq_base_swa", config["rope_theta"] if second else 10_000.0)
    if second and local_theta != config["rope_theta"]:
        raise keys.refused("rope.freq_base_swa", "that of all layers")
    found: dict[str, Any] = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar(config, architecture),
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if window and s else "full_attention" for s in sliding],
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0 if second else 0.0) or None,
    }
    if second:
        return found | {"attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0)}
    return found | {"rope_local_base_freq": local_theta}


def _phi3(keys: "_Keys", config: dict[str, Any]) -> dict[str, Any]:
    """Its window, how much of a head rotates, and what the frequencies are divided by."""
    if keys.take("rope.scaling.type", "none") not in ("none", "longrope"):
        raise keys.refused("rope.scaling.type", "none or longrope")
    dims = keys.whole("rope.dimension_count", config["head_dim"])
    magnitude = keys.number("rope.scaling.attn_factor", 1.0)
    positions = config["max_position_embeddings"]
    found: dict[str, Any] = {
        "partial_rotary_factor": dims / config["head_dim"],
        "sliding_window": keys.whole("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length", positions),
    }
    if not keys.file.tensors.keys() & ROPE_LISTS.values():
        if magnitude != 1.0:
            raise keys.refused("rope.scaling.attn_factor", f"1.0 without {' and '.join(ROPE_LISTS.values())}")
        return found
    lists = {key: _float32(keys.file, name, dims // 2) for key, name in ROPE_LISTS.items()}
    scaling: dict[str, Any] = {key: [float(str(d)) for d in divisors] for key, divisors in lists.items()}
    return found | {"rope_scaling": {"rope_type": "longrope", "attention_factor": magnitude} | scaling}


def _granite(keys: "_Keys", config: dict[str, Any]) -> dict[str, Any]:
    """What Granite multiplies by."""
    if keys.take("rope.scaling.finetuned", True) is not True:  # there it says whether there is rope at all
        raise keys.refused("rope.scaling.finetuned", "True")
    return {
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "attention_multiplier": keys.number("attention.scale", config["head_dim"] ** -0.5),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale"),
    }


def query_scalar(config: Mapping[str, Any], architecture: str) -> int:
    """query_pre_attn_scalar, which has no key: by llama.cpp, head_dim but for the models of 27B."""
    if config["num_hidden_layers"] == _GEMMA_27B[architecture]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _has_biases(file: GgufFile, *parts: str) -> bool:
    return any(f"blk.0.{part}.bias" in file.tensors for part in parts)


class _Keys:
    """The metadata of one architecture; knows what has been asked for, so that nothing is passed over."""

    def __init__(self, file: GgufFile, architecture: str):
        self.file = file
        self._prefix = f"{architecture}."
        self._left = {key for key in file.metadata if key.startswith(self._prefix)}
        self._left -= {self._prefix + key for key in _IDLE}

    def take(self, key: str, default: Any = None) -> Any:
        self._left.discard(self._prefix + key)
        return self.file.metadata.get(self._prefix + key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A count; where every layer has its own, they must be the same. Below 1 only the default may be."""
        value = self.take(key, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or (value < 1 and value != default):
            raise self.refused(key, "one whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A measure; not above 0 only the default may be."""
        value = self.take(key, default)
        if type(value) in (int, float):
            with np.errstate(over="ignore"):
                short = float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
            if 0 < short < math.inf or short == default:
                return short
        raise self.refused(key, "a number above 0")

    def refused(self, key: str, served: str) -> ConfigError:
        name = self._prefix + key
        found = f"{name} is {self.file.metadata[name]!r}" if name in self.file.metadata else f"lacks {name}"
        return ConfigError(f"{self.file.path}: {found}; served is {served}")

    def all_taken(self) -> None:
        """Raises ConfigError for the keys that nothing asked for, unless they are off: they would change the result."""
        metadata = self.file.metadata
        on = [key for key in sorted(self._left) if isinstance(metadata[key], list | np.ndarray) or metadata[key]]
        if on:
            told = ", ".join(f"{key} = {metadata[key]!r:.60}" for key in on)
            raise ConfigError(f"{self.file.path}: asks for what is not computed here: {told}")


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    """Scaling by metadata: none or linear, which is also meant where only a factor is given."""
    kind = keys.take("rope.scaling.type", "linear")
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise keys.refused("rope.scaling.type", "none or linear")
    if keys.number("rope.scaling.attn_factor", 0.0) not in (0.0, 1.0):
        raise keys.refused("rope.scaling.attn_factor", "1.0")
    older = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", 0.0) or older
    if kind == "none" or factor in (0.0, 1.0):
        return None
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters whose divisors rope_freqs.weight holds: Llama 3's usual ones, with any factor."""
    half = config["head_dim"] // 2
    divisors = _float32(file, ROPE_FREQS, half).astype(np.float64)
    if np.allclose(divisors, 1.0, rtol=1e-5, atol=0):
        return None
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        # The longest wavelengths are divided by the whole factor.
        "factor": float(str(np.float32(divisors.max()))),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if 1 < scaling["factor"] < math.inf:
        meant = llama3_divisors(scaling, config["rope_theta"], 2 * half)
        if np.allclose(divisors, meant, rtol=1e-5, atol=0):
            return scaling
    raise ConfigError(
        f"{file.path}: {ROPE_FREQS} is not Llama 3's rope scaling (low 1, high 4, original context 8192), "
        "and no other one is served"
    )


def _float32(file: GgufFile, name: str, size: int) -> np.ndarray:
    """A vector of the file. Raises ConfigError for one that is not there, or not float32 [size]."""
    info = file.tensors.get(name)
    if info is None or info.format.name != "F32" or info.shape != (size,):
        found = "missing" if info is None else f"{info.format.name} {list(info.shape)}"
        raise ConfigError(f"{file.path}: {name} is {found}, not F32 [{size}]")
    return file.raw(name).reshape(-1).view(np.float32)


def llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3's scaling divides each rotary frequency by: float64 [head_dim / 2]."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    kept = np.clip(kept, 0.0, 1.0)
    return 1 / (kept + (1 - kept) / scaling["factor"])
