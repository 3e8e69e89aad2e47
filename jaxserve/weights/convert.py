"""Turns a checkpoint directory into an Orbax checkpoint directory that a server needs nothing else beside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.weights import CONFIG, FLOATS, open_checkpoint
from jaxserve.weights.orbax import save_orbax
from jaxserve.weights.problems import Problems

_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "*_Pooling/config.json")


def convert(src: Path, dst: Path, *, dtype: Any = None, progress: Callable[[int, int], None] | None = None) -> None:
    """Writes the checkpoint `src` as the Orbax checkpoint `dst`, which appears whole or not at all.

    `dtype` (float32, bfloat16 or float16) casts the weights; without it they stay as they are.
    Tokenizer, generation config and chat template come along. `progress(written, total)` counts bytes.
    Raises ConfigError if `dst` is taken or `src` holds no checkpoint; CheckpointError if that is damaged
    or holds tensors of another dtype.
    """
    checkpoint = open_checkpoint(src)
    problems = Problems(src)
    for name in checkpoint.names():
        if checkpoint.dtype(name) not in FLOATS:
            problems.add("unsupported dtype", f"{name} is {checkpoint.dtype(name).name}")
    problems.raise_any()
    config = dict(checkpoint.config)
    if dtype is not None:
        # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; nested configs keep theirs
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = np.dtype(dtype).name
    beside = sorted({f for pattern in _COPIED for f in src.glob(pattern) if f.is_file()})
    save_orbax(
        dst,
        config,
        {name: checkpoint.read(name) for name in sorted(checkpoint.names())},
        dtype=dtype,
        extra_files={
            str(f.relative_to(src)): f for f in beside if f != src / CONFIG and not f.name.endswith(".index.json")
        },
        progress=progress,
    )
