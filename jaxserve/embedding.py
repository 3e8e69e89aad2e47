"""What a checkpoint says of its embeddings, and how a pooled hidden state becomes one. No jax, no text.

The files beside config.json are those of sentence-transformers: modules.json lists a Transformer, a Pooling and perhaps
a Normalize, each with a folder of its own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import ConfigError, InvalidParameter, JaxserveError, UnsupportedParameter
from jaxserve.request import EmbeddingInfo, PoolingKind

HEADLESS = "headless"
"""In a config: the checkpoint has no output matrix, and the config's own word on that is not to be trusted."""
POOLING_TYPE = "pooling_type"
"""In a config: the PoolingKind that a GGUF file names."""

_MODES: dict[str, PoolingKind] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NORM_FLOOR = 1e-12


def read_embedding(
    path: Path, config: Mapping[str, Any], *, causal: bool, width: int, task: str, pooling: PoolingKind | None
) -> EmbeddingInfo | None:
    """How the checkpoint at `path` makes embeddings; None for one that is to generate.

    `config` is its config.json; `task` and `pooling` are ModelOptions'. Raises ConfigError for options and files that
    contradict the model, or ask for what is not computed.
    """
    folder = path if path.is_dir() else None
    modules = _modules(folder) if folder is not None and task != "generate" else {}
    headless, named = bool(config.get(HEADLESS)), config.get(POOLING_TYPE)
    if task == "generate" and (headless or not causal):
        lack = "has no output matrix" if causal else "is an encoder"
        raise ConfigError(f"task generate: the model {lack} and gives embeddings only; leave --task out")
    if task == "generate" or (task == "auto" and causal and not (modules or headless or named)):
        if pooling is not None:
            raise ConfigError(f"pooling {pooling}: only embeddings are pooled; give --task embed as well")
        return None
    said = _pooling_said(folder, modules, width) if folder is not None and modules else named
    kind: PoolingKind | None = pooling or said or ("last" if causal else None)
    if kind is None:
        raise ConfigError(
            f"{path} does not say how embeddings are made (it has no modules.json); give --pooling mean or cls"
        )
    if causal and kind != "last":
        raise ConfigError(f"pooling {kind}: of decoders the last token's hidden state is served; give --pooling last")
    sizes = tuple(config.get("matryoshka_dimensions") or ())
    if not all(type(n) is int and 0 < n <= width for n in sizes):
        raise ConfigError(f"config.json has matryoshka_dimensions={list(sizes)!r}; served are numbers in [1, {width}]")
    texts = _texts(folder) if folder is not None and modules else {}
    return EmbeddingInfo(
        pooling=kind,
        width=width,
        normalised="Normalize" in modules or not modules,
        shortened=bool(config.get("is_matryoshka") or sizes),
        sizes=sizes,
        **texts,
    )


def says_embedding(path: Path, config: Mapping[str, Any], *, task: str, pooling: PoolingKind | None) -> bool:
    """Whether read_embedding will find that the checkpoint is for embeddings, before its model is known."""
    if task != "auto":
        return task == "embed"
    # A pooling without a task is for an encoder, or refused.
    said = pooling is not None or config.get(HEADLESS) or config.get(POOLING_TYPE)
    return bool(said or (path.is_dir() and _modules(path)))


def check_dimensions(dimensions: int | None, info: EmbeddingInfo) -> None:
    """Raises InvalidParameter or UnsupportedParameter for embeddings of a size that the model does not give."""
    if dimensions is None or dimensions == info.width:
        return
    if not 1 <= dimensions <= info.width:
        raise InvalidParameter(f"dimensions must be in [1, {info.width}], got {dimensions}", param="dimensions")
    if not info.shortened:
        raise UnsupportedParameter(
            f"this model's embeddings have {info.width} dimensions and are not said to keep their meaning when cut; "
            'leave dimensions out, or put "is_matryoshka": true into its config.json',
            param="dimensions",
        )
    if info.sizes and dimensions not in info.sizes:
        served = ", ".join(map(str, sorted({*info.sizes, info.width})))
        raise InvalidParameter(f"dimensions must be one of {served}, got {dimensions}", param="dimensions")


def finished(pooled: bytes, info: EmbeddingInfo, dimensions: int | None = None) -> np.ndarray:
    """The embedding, float32 [dimensions or width], of a Delta's; `dimensions` must have been checked."""
    vector = np.frombuffer(pooled, np.float32)[:dimensions].astype(np.float64)
    if not np.isfinite(vector).all():
        raise JaxserveError("the model's hidden states hold numbers that are not finite")
    if info.normalised:
        vector /= max(float(np.sqrt(np.square(vector).sum())), _NORM_FLOOR)
    return vector.astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of the angle between two embeddings; 0 if one has no length."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    length = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float(np.multiply(a, b).sum()) / length if length > _NORM_FLOOR else 0.0


def _modules(folder: Path) -> dict[str, str]:
    """The folder of each module, by the last part of its type; empty without modules.json."""
    entries = _read(folder / "modules.json", list)
    found: dict[str, str] = {}
    for entry in entries or ():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("type", "path")):
            raise ConfigError(f"{folder / 'modules.json'}: expected objects with `type` and `path`")
        kind = entry["type"].rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ConfigError(
                f"{folder / 'modules.json'} lists a module {entry['type']!r}; served are Transformer, Pooling and "
                "Normalize"
            )
        found[kind] = entry["path"]
    if found and found.get("Transformer") != "":
        raise ConfigError(f"{folder / 'modules.json'}: its Transformer must lie beside it")
    return found


def _pooling_said(folder: Path, modules: Mapping[str, str], width: int) -> PoolingKind | None:
    if "Pooling" not in modules:
        return None
    file = folder / modules["Pooling"] / "config.json"
    said = _read(file, dict)
    if said is None:
        raise ConfigError(
            f"{file} is missing, which modules.json names; download the whole checkpoint, its folders too"
        )
    on = [name for name, value in said.items() if name.startswith("pooling_mode_") and value]
    if len(on) != 1 or on[0] not in _MODES:
        raise ConfigError(f"{file} asks for {', '.join(on) or 'no pooling'}; served is one of {', '.join(_MODES)}")
    if said.get("word_embedding_dimension", width) != width:
        raise ConfigError(f"{file} is of {said['word_embedding_dimension']} dimensions, config.json of {width}")
    return _MODES[on[0]]


def _texts(folder: Path) -> dict[str, Any]:
    """What is done to a text before it is computed, as fields of EmbeddingInfo."""
    file = folder / "sentence_bert_config.json"
    said = _read(file, dict) or {}
    longest = said.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ConfigError(f"{file} has max_seq_length={longest!r}; expected a whole number above 0")
    file = folder / "config_sentence_transformers.json"
    other = _read(file, dict) or {}
    name = other.get("default_prompt_name")
    prompt = "" if name is None else (other.get("prompts") or {}).get(name)
    if not isinstance(prompt, str):
        raise ConfigError(f"{file} has default_prompt_name={name!r}, which is none of its prompts")
    return {"longest": longest, "lower": bool(said.get("do_lower_case")), "prompt": prompt}


def _read[Kind](file: Path, kind: type[Kind]) -> Kind | None:
    """A JSON file's content; None if it is absent. Raises ConfigError."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, kind):
        raise ConfigError(f"{file}: expected a JSON {kind.__name__}, found {type(value).__name__}")
    return value
