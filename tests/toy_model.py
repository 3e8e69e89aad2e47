"""A model file whose next token is the last one plus one: what an engine does with it can be worked out by hand.

The token reaches the logits only through the paged cache, so that a lost or foreign page shows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxserve.spec import weight

VOCAB = 50


@dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return cls(1, 1, 1, 1, 2, VOCAB, hf["max_position_embeddings"])


def param_specs(c):
    return {"one": weight(c, "width", "one")}


def forward(p, c, tokens, positions, cache, attend):
    # Query and key meet in "how near is the position", steeply: a token attends to itself alone.
    at = positions.astype(jnp.float32)[:, None, None]  # [T, 1, 1]
    said = tokens.astype(jnp.float32)[:, None, None]
    q = jnp.concatenate([jnp.full_like(at, 50.0), jnp.zeros_like(at)], axis=-1)
    k = jnp.concatenate([at, jnp.zeros_like(at)], axis=-1)
    v = jnp.concatenate([said, said], axis=-1)
    out, cache = attend(0, q, k, v, cache, scale=1.0)
    return out[:, 0, :1] * p["one"][None, :], cache  # [T, 1]


def logits(p, c, hidden):
    """-(distance to last + 1), in tenths: the best token is last + 1, then its neighbours."""
    ids = jnp.arange(VOCAB, dtype=jnp.float32)[None, :]
    return -jnp.abs(ids - jnp.round(hidden) - 1.0) / 10


def expected_logits(last):
    """The same on the host: float64 [VOCAB]."""
    return -np.abs(np.arange(VOCAB) - last - 1.0) / 10


def write_checkpoint(path: Path, max_positions: int = 128) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["ToyForCausalLM"], "max_position_embeddings": max_positions}
    (path / "config.json").write_text(json.dumps(config))
    save_file({"one": np.ones(1, np.float32)}, path / "model.safetensors")
    return path
