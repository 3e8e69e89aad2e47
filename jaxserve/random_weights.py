"""Draws weights for a model file: arrays to compute with, or a small checkpoint that can be served."""

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxserve.dry_run import specs_of
from jaxserve.errors import ConfigError
from jaxserve.hub import resolve_model
from jaxserve.spec import Model, ParamSpec

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def draw(spec: ParamSpec, seed: int = 0) -> np.ndarray:
    """float32 of the spec's shape, the same for the same name, rows and seed.

    Large enough that attention is far from uniform, and nothing stays at 0 or 1: a model in which a weight does not
    matter hides what is wrong with it.
    """
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode()), *(spec.rows or ())])
    if spec.name.endswith("bias"):
        values = rng.normal(0.0, 0.3, spec.shape)
    elif len(spec.shape) == 1:
        values = rng.uniform(0.5, 1.5, spec.shape)
    else:
        values = rng.normal(0.0, 2.0 / math.sqrt(spec.stored_shape[-1]), spec.shape)
    return values.astype(np.float32)


def draw_params(specs: Any, seed: int = 0) -> Any:
    """The tree of arrays for a tree of specs."""
    return jax.tree.map(lambda spec: draw(spec, seed), specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def write_checkpoint(model: Model, hf: Mapping[str, Any], path: Path, seed: int = 0) -> int:
    """Writes a directory of config.json, drawn weights and the embedded model's tokenizer; how many weights it has.

    Raises ConfigError when the directory exists, or when the vocabulary is too small for that tokenizer.
    """
    embedded = resolve_model(None)
    config = model.config_from_hf(hf)
    words = json.loads((embedded / "config.json").read_text())["vocab_size"]
    if config.vocab < words:
        raise ConfigError(
            f"a vocabulary of {config.vocab} tokens is too small for the embedded tokenizer; "
            f"let vocab_size be {words} or more"
        )
    specs = jax.tree.leaves(specs_of(model, config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already; name another directory, or remove it") from error
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}") from error
    parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for spec in specs:
        drawn = draw(spec, seed).reshape(len(spec.names), *spec.stored_shape)
        for name, part in zip(spec.names, drawn, strict=True):
            parts.setdefault(name, {})[spec.rows or ()] = part
    tensors = {name: np.concatenate([found[rows] for rows in sorted(found)]) for name, found in parts.items()}
    (path / "config.json").write_text(json.dumps(dict(hf), indent=2) + "\n")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for name in _TEXT_FILES:
        shutil.copy(embedded / name, path / name)
    return sum(tensor.size for tensor in tensors.values())
