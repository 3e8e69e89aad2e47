"""What a job's results depend on, in words that can be compared: input, checkpoint, settings, code and engine."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxserve import __version__
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions
from jaxserve.model_code import sources_digest
from jaxserve.request import EngineInfo

# Options that change no answer: where the checkpoint and a model's code lie, what is compiled when, and how much memory
# there is.
_WITHOUT_EFFECT = (
    *("model", "model_code", "revision", "max_model_len", "warmup", "compile_cache_dir"),
    *("memory_utilization", "num_kv_pages"),
)
_PACKAGES = ("jax", "jaxlib", "jinja2", "sentencepiece", "tokenizers")
_SAMPLED_FROM = 64 * 2**20
_SAMPLES, _SAMPLE = 256, 2**16


def describe(
    input_digest: str, checkpoint: Path, name: str, options: EngineOptions, settings: Mapping[str, Any]
) -> dict[str, str]:
    """All that is known before the engine runs."""
    found = {"input": input_digest, "checkpoint": checkpoint_digest(checkpoint), "model name": name, "code": _code()}
    sections: tuple[tuple[type, Any], ...] = ((ModelOptions, options.model), (DeviceOptions, options.device))
    for section, given in sections:
        found |= {f.name: str(getattr(given, f.name)) for f in fields(section) if f.name not in _WITHOUT_EFFECT}
    code = options.model.model_code
    found["model code"] = "of jaxserve" if code is None else sources_digest(code)
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


def checkpoint_digest(path: Path) -> str:
    """A digest of a model's files: small ones whole, of larger ones the size and _SAMPLES pieces spread over them.

    Hidden files and .md are left out. A GGUF file counts with the rest of its split.
    """
    if path.is_file():
        stem = path.name.rpartition("-of-")[0].rpartition("-")[0]
        files = sorted(path.parent.glob(f"{stem}-*-of-*{path.suffix}")) if stem else []
        files = files if path in files else [path]
        root = path.parent
    else:
        root = path
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".md")
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    found = hashlib.blake2b(digest_size=20)
    for file in files:
        size = file.stat().st_size
        # A single file may be called what one likes.
        found.update(f"{file.relative_to(root) if len(files) > 1 else ''}\0{size}\0".encode())
        with file.open("rb") as data:
            if size <= _SAMPLED_FROM:
                found.update(data.read())
                continue
            for i in range(_SAMPLES):
                data.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
                found.update(data.read(_SAMPLE))
    return found.hexdigest()


def _code() -> str:
    """Versions, and a digest of every source of this package."""
    found = hashlib.blake2b(digest_size=6)
    root = Path(__file__).parent.parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cc", ".h", ".proto")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    return ", ".join([f"jaxserve {__version__} ({found.hexdigest()})", *versions])
