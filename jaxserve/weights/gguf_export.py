"""A checkpoint directory in GGUF's terms, the way back of weights/gguf.py: hyperparameters, tensor names, row order."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.embedding import HEADLESS
from jaxserve.errors import ConfigError
from jaxserve.formats import FORMATS, Format
from jaxserve.gguf import GgufFile
from jaxserve.spec import expert_counts, only_served, sliding_layers
from jaxserve.weights import FLOATS, Checkpoint
from jaxserve.weights.gguf import (
    ARCHITECTURES,
    GEMMA,
    INTERLEAVED,
    ROPE_FREQS,
    ROPE_LISTS,
    TOP_NAMES,
    halves_from_pairs,
    layer_names,
    llama3_divisors,
    query_scalar,
)
from jaxserve.weights.problems import Problems

_FAMILIES = {hf: name for name, hf in ARCHITECTURES.items()} | {
    "MistralForCausalLM": "llama", "MixtralForCausalLM": "llama",
}  # fmt: skip
_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<number>0|[1-9]\d*)(?P<after>\..*)", re.DOTALL)
_FORMATS = dict(zip(FLOATS, (FORMATS["F32"], FORMATS["BF16"], FORMATS["F16"]), strict=True))
_TOP = {hf: gguf for gguf, hf in TOP_NAMES.items()}
_LAYER = "model.layers."
# Tables that follow from the config, which older checkpoints hold.
_COMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
# What a config.json may leave out.
_GEMMA = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA
    | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": _GEMMA | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    "granite": {"max_position_embeddings": 2048}
    | dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
}
# Of Granite.
_MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a model, under its GGUF name and in GGUF's order of rows."""

    format: Format
    shape: tuple[int, ...]
    """In numpy's order; the last axis is the packed one."""
    raw: Callable[[slice], np.ndarray]
    """The bytes of some rows, uint8 [rows, row_bytes]; a vector is one row. Threads may call it at once."""

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.format.row_bytes(self.shape[-1])


def gguf_tensors(file: GgufFile) -> dict[str, SourceTensor]:
    """The tensors of a GGUF file as they are."""
    return {
        name: SourceTensor(info.format, info.shape, file.raw(name).__getitem__) for name, info in file.tensors.items()
    }


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """general.architecture and the architecture's own keys. Raises ConfigError for what GGUF has no word for."""
    if config.get(HEADLESS):
        raise ConfigError(
            "an embedding model without output matrix; quantising such is not served, only the whole model"
        )
    architecture = _architecture(config)
    config = _DEFAULTS.get(architecture, {}) | dict(config)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    found: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config.get("max_position_embeddings", 2048 if architecture == "llama" else 32768),
        "embedding_length": width,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "rope.freq_base": float(_scaling(config).get("rope_theta", config.get("rope_theta", 10_000.0))),
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
    }
    if config.get("head_dim"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if architecture in INTERLEAVED:
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim}
    if architecture in _OWN_KEYS:
        found |= _OWN_KEYS[architecture](config)
    elif config.get("sliding_window") and (architecture == "llama" or config.get("use_sliding_window")):
        if architecture != "llama":
            raise ConfigError(f"sliding windows of {architecture} have no key in GGUF; its checkpoint stays as it is")
        found["attention.sliding_window"] = config["sliding_window"]
    if "num_experts_per_tok" in config:
        found |= _experts(config, architecture)
    if _scaling_kind(config) == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(_scaling(config)["factor"])}
    return {"general.architecture": architecture, "general.type": "model"} | {
        f"{architecture}.{key}": value for key, value in found.items()
    }


def hf_tensors(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint directory in the order of the model. Raises CheckpointError naming all that have no
    GGUF name or a dtype that is not read."""
    architecture = _architecture(checkpoint.config)
    config = _DEFAULTS.get(architecture, {}) | checkpoint.config
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    interleaved = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}
    if architecture not in INTERLEAVED:
        interleaved = {}
    problems = Problems(checkpoint.path)
    found: dict[str, SourceTensor] = {}
    groups = _stacks(checkpoint.names())
    for name in sorted(groups, key=lambda name: _place(name, architecture)):
        if name.endswith(_COMPUTED) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        theirs, members = gguf_name(name, architecture), groups[name]
        shape, dtype = checkpoint.shape(members[0]), checkpoint.dtype(members[0])
        if theirs is None:
            problems.add("tensor without a name in GGUF", name)
        elif dtype not in _FORMATS:
            problems.add("unsupported dtype", f"{name} is {dtype}")
        elif "*" in name:
            if len(members) != expert_counts(config)[0] or any(
                (checkpoint.shape(member), checkpoint.dtype(member)) != (shape, dtype) for member in members
            ):
                problems.add("experts that do not make a stack", name)
            found[theirs] = SourceTensor(_FORMATS[dtype], (len(members), *shape), _stack_reader(checkpoint, members))
        else:
            part = theirs.split(".")[2] if theirs.startswith("blk.") else ""
            order = None
            if part in interleaved:
                if shape[0] != interleaved[part] * head_dim:
                    problems.add("wrong shape", f"{name} is {list(shape)} for {interleaved[part]} heads of {head_dim}")
                    continue
                order = np.argsort(halves_from_pairs(interleaved[part], head_dim))
            if theirs.endswith("ffn_gate_inp.weight"):  # a router, of which llama.cpp keeps every digit
                found[theirs] = SourceTensor(FORMATS["F32"], shape, _as_float32(checkpoint, name))
                continue
            if architecture in GEMMA and theirs.endswith("norm.weight"):
                found[theirs] = SourceTensor(FORMATS["F32"], shape, _one_added(checkpoint, name))
                continue
            found[theirs] = SourceTensor(_FORMATS[dtype], shape, _reader(checkpoint, name, order))
    problems.raise_any()
    if _scaling_kind(config) == "llama3":
        factors = _llama3_factors(config, head_dim)
        found = {ROPE_FREQS: SourceTensor(FORMATS["F32"], factors.shape, _bytes_of(factors))} | found
    if _scaling_kind(config) == "longrope":
        lists = {name: np.array(_scaling(config)[key], np.float32) for key, name in ROPE_LISTS.items()}
        found = {n: SourceTensor(FORMATS["F32"], d.shape, _bytes_of(d)) for n, d in lists.items()} | found
    return found


def _stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what they are written as: those of a layer's experts, in their order, by one name with a `*`."""
    found: dict[str, list[str]] = {}
    stacks: dict[str, dict[int, str]] = {}
    for name in names:
        if expert := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{expert['before']}*{expert['after']}", {})[int(expert["number"])] = name
        else:
            found[name] = [name]
    for stack, members in stacks.items():
        if sorted(members) == list(range(len(members))):
            found[stack] = [members[i] for i in range(len(members))]
        else:  # which have no name as they are
            found |= {name: [name] for name in members.values()}
    return found


def _experts(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keys of a model with experts. Raises ConfigError for what llama.cpp would compute otherwise."""
    experts, used = expert_counts(config)
    found = {"expert_count": experts, "expert_used_count": used}
    if architecture == "llama":
        return found
    if not config.get("norm_topk_prob"):
        raise ConfigError("experts' weights that are not normalised (norm_topk_prob) have no key in GGUF's qwen3moe")
    only_served(config, decoder_sparse_step=1, mlp_only_layers=[])
    return found | {"expert_feed_forward_length": config["moe_intermediate_size"]}


def _gemma(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Gemma's own keys. Raises ConfigError for what llama.cpp would compute otherwise."""
    only_served(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False, use_bidirectional_attention=False)
    scalar, meant = config["query_pre_attn_scalar"], query_scalar(config, architecture)
    if scalar != meant:
        raise ConfigError(f"query_pre_attn_scalar={scalar} has no key in GGUF, where it is {meant} for these sizes")
    sliding = sliding_layers(config, config.get("sliding_window_pattern", GEMMA[architecture]))
    found: dict[str, Any] = {}
    if architecture == "gemma2":
        only_served(config, tie_word_embeddings=True)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not config[key]:
                raise ConfigError(f"gemma2 without {key} cannot be written as GGUF; it always has one there")
            found[key] = float(config[key])
    else:
        only_served(config, attn_logit_softcapping=None)
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise ConfigError("GGUF has no word for scaled rope of gemma3's local layers")
        found["rope.freq_base_swa"] = float(local.get("rope_theta", config["rope_local_base_freq"]))
        if config.get("final_logit_softcapping"):
            found["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    if any(sliding) or architecture == "gemma2":
        found["attention.sliding_window"] = config["sliding_window"]
        if sliding != tuple((i + 1) % GEMMA[architecture] != 0 for i in range(len(sliding))):
            found["attention.sliding_window_pattern"] = np.array(sliding)
    return found


def _phi3(config: Mapping[str, Any]) -> dict[str, Any]:
    only_served(config, hidden_act="silu")
    _usual_head_dim(config, "phi3")
    scaling = _scaling(config)
    part = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dims = int(part * (config["hidden_size"] // config["num_attention_heads"]))
    original = config["original_max_position_embeddings"]
    found = {
        "rope.dimension_count": dims,
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.get("sliding_window") or 0,  # 0, as llama.cpp writes it
    }
    if _scaling_kind(config) == "longrope":
        for key in ROPE_LISTS:
            if len(scaling[key]) != dims // 2:
                raise ConfigError(f"{key} has {len(scaling[key])} numbers for {dims} dimensions that rotate in pairs")
        stretch = max(scaling.get("factor") or config["max_position_embeddings"] / original, 1.0)
        magnitude = scaling.get("attention_factor") or math.sqrt(1 + math.log(stretch) / math.log(original))
        found["rope.scaling.attn_factor"] = float(magnitude)
    return found


def _olmo2(config: Mapping[str, Any]) -> dict[str, Any]:
    only_served(config, hidden_act="silu", attention_bias=False, tie_word_embeddings=False)
    _usual_head_dim(config, "olmo2")
    return {}


def _granite(config: Mapping[str, Any]) -> dict[str, Any]:
    only_served(config, hidden_act="silu")
    return {key: float(config[hf]) for key, hf in _MULTIPLIERS.items()}


def _smollm3(config: Mapping[str, Any]) -> dict[str, Any]:
    only_served(config, hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise ConfigError("sliding windows of smollm3 have no key in GGUF; its checkpoint stays as it is")
    layers, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    if len(rotated) < layers or any(bool(rotated[i]) != ((i + 1) % 4 != 0) for i in range(layers)):
        raise ConfigError("which layers of smollm3 have rope has no key in GGUF, where all but every fourth have it")
    return {}


def _usual_head_dim(config: Mapping[str, Any], architecture: str) -> None:
    given, usual = config.get("head_dim"), config["hidden_size"] // config["num_attention_heads"]
    if given not in (None, usual):
        raise ConfigError(f"head_dim={given} of {architecture} cannot be written as GGUF; there it is {usual}")


_OWN_KEYS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": lambda config: _gemma(config, "gemma2"),
    "gemma3": lambda config: _gemma(config, "gemma3"),
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "smollm3": _smollm3,
}
"""By architecture, its own hyperparameters. Each raises ConfigError for what llama.cpp would compute otherwise."""


def gguf_name(name: str, architecture: str) -> str | None:
    """GGUF's name of a Hugging Face tensor; None where there is none."""
    if name in _TOP:
        return _TOP[name]
    if name.startswith(_LAYER):
        layer, _, rest = name.removeprefix(_LAYER).partition(".")
        part, _, kind = rest.rpartition(".")
        parts = {hf: gguf for gguf, hf in layer_names(architecture).items()}
        if layer.isdecimal() and part in parts and kind in ("weight", "bias"):
            return f"blk.{layer}.{parts[part]}.{kind}"
    return None


def size_label(parameters: int) -> str:
    """As in model names: 7B, 1.5B, 360M."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            count = parameters / unit
            return f"{count:.1f}{letter}".replace(".0", "") if count < 9.95 else f"{count:.0f}{letter}"
    return str(parameters)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in _FAMILIES:
            return _FAMILIES[name]
    raise ConfigError(f"architectures {names} cannot be written as GGUF here; {', '.join(_FAMILIES)} can")


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return found.get("full_attention", found)  # of Gemma 3's two, which has a key of its own for the other


def _scaling_kind(config: Mapping[str, Any]) -> str:
    scaling = _scaling(config)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if _architecture(config) == "phi3":
        if kind not in ("default", "longrope", "su"):
            raise ConfigError(f"rope scaling {kind!r} of phi3 is not served; served are default and longrope")
        return "longrope" if kind == "su" else str(kind)
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"rope scaling {kind!r} is not served; served are default, linear and llama3")
    if kind == "llama3" and _architecture(config) != "llama":
        raise ConfigError(f"rope scaling llama3 of {_architecture(config)} has no place in GGUF")
    return str(kind)


def _llama3_factors(config: Mapping[str, Any], head_dim: int) -> np.ndarray:
    scaling = dict(_scaling(config))
    scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10_000.0)))
    return llama3_divisors(scaling, theta, head_dim).astype(np.float32)


def _place(name: str, architecture: str) -> tuple[int, int, str]:
    """Sorts tensors in the order in which a model uses them."""
    if name.startswith(_LAYER):
        layer = name.removeprefix(_LAYER).partition(".")[0]
        return 1, int(layer) if layer.isdecimal() else 0, gguf_name(name, architecture) or name
    return (0 if "embed" in name else 2), 0, name


def _reader(checkpoint: Checkpoint, name: str, order: np.ndarray | None) -> Callable[[slice], np.ndarray]:
    vector = len(checkpoint.shape(name)) == 1

    def raw(rows: slice) -> np.ndarray:
        whole = checkpoint.read(name)
        if vector:
            return _as_bytes((whole if order is None else whole[order])[None])[rows]
        return _as_bytes(whole[rows] if order is None else whole[order[rows]])

    return raw


def _stack_reader(checkpoint: Checkpoint, names: Sequence[str]) -> Callable[[slice], np.ndarray]:
    """Rows of matrices of one shape that follow one another."""
    each = checkpoint.shape(names[0])[0]

    def raw(rows: slice) -> np.ndarray:
        first, last = rows.start // each, (rows.stop - 1) // each
        parts = [
            checkpoint.read(names[i])[max(rows.start - i * each, 0) : rows.stop - i * each]
            for i in range(first, last + 1)
        ]
        return _as_bytes(np.concatenate(parts) if len(parts) > 1 else parts[0])

    return raw


def _as_float32(checkpoint: Checkpoint, name: str) -> Callable[[slice], np.ndarray]:
    return lambda rows: _as_bytes(checkpoint.read(name)[rows].astype(np.float32))


def _one_added(checkpoint: Checkpoint, name: str) -> Callable[[slice], np.ndarray]:
    """A norm's weight as Gemma multiplies by it."""
    return lambda rows: _as_bytes(checkpoint.read(name).astype(np.float32)[None] + np.float32(1))[rows]


def _bytes_of(vector: np.ndarray) -> Callable[[slice], np.ndarray]:
    return lambda rows: _as_bytes(vector[None])[rows]


def _as_bytes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
