"""What a job's results depend on, in words that can be compared: input, checkpoint, settings, code and engine."""

import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions
from jaxserve.fingerprint import checkpoint_digest, code_version
from jaxserve.model_code import sources_digest
from jaxserve.request import EngineInfo

# Options that change no answer: where the checkpoint and a model's code lie, what is compiled when, and how much memory
# there is.
_WITHOUT_EFFECT = (
    *("model", "model_code", "revision", "max_model_len", "warmup", "compile_cache_dir"),
    *("memory_utilization", "num_kv_pages"),
)
_PACKAGES = ("jax", "jaxlib", "jinja2", "sentencepiece", "tokenizers")


def describe(
    input_digest: str, checkpoint: Path, name: str, options: EngineOptions, settings: Mapping[str, Any]
) -> dict[str, str]:
    """All that is known before the engine runs."""
    found = {"input": input_digest, "checkpoint": checkpoint_digest(checkpoint), "model name": name}
    found["code"] = code_version(*_PACKAGES)
    sections: tuple[tuple[type, Any], ...] = ((ModelOptions, options.model), (DeviceOptions, options.device))
    for section, given in sections:
        found |= {f.name: str(getattr(given, f.name)) for f in fields(section) if f.name not in _WITHOUT_EFFECT}
    found["model code"] = sources_digest(options.model.model_code)
    return found | {name: str(value) for name, value in settings.items()}


def describe_engine(info: EngineInfo, options: EngineOptions) -> dict[str, str]:
    """What the engine worked out. On CPU a row's bits are the same in every batch; elsewhere the batches count too."""
    names = ["architecture", "num_params", "vocab_size", "max_model_len", "dtype", "platform", "attention"]
    found = {f"engine's {name}": str(getattr(info, name)) for name in names}
    found["machine"] = platform.machine()
    if info.platform != "cpu":
        found |= {f"engine's {name}": str(getattr(info, name)) for name in ("max_num_seqs", "max_num_batched_tokens")}
        found |= {name: str(getattr(options.schedule, name)) for name in ("enable_prefix_caching", "decode_steps")}
    return found


def differences(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What of `now` the earlier job had otherwise."""
    return [f"{name} was {was.get(name, 'not there')}, is {now[name]}" for name in now if was.get(name) != now[name]]
