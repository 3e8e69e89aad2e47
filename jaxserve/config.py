"""Every setting, once: these dataclasses are the command line's flags, the JAXSERVE_* variables and the TOML keys.

Field names follow vLLM's flags for what vLLM has. None means "worked out from the model and the machine",
and what was worked out is printed at start-up.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from jaxserve.errors import ConfigError

DEFAULT_MODEL_NAME = "jaxserve-tiny"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and in what precision."""

    model: str | None = None
    """Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model is served."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of activations and of plain weights. auto: float32 on CPU, whose kernels multiply matrices in the type
    that the checkpoint stores, bfloat16 on TPU and GPU."""
    quantization: Literal["q8_0", "q6_k", "q5_k", "q4_k", "q4_0"] | None = None
    """Quantise the matrices of a plain checkpoint at load, to a block format of GGUF; CPU only. The K formats take a
    minute or two a billion weights: `jaxserve quantize` does it once and for all."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. Default: what the model was made for, if the memory holds it."""

    def __post_init__(self) -> None:
        _at_least("max_model_len", self.max_model_len, 1)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How requests share the steps."""

    max_num_seqs: int | None = None
    """Sequences computed at once. Default: 64 on CPU, 256 on TPU and GPU."""
    max_num_batched_tokens: int | None = None
    """Token budget of a step. Default: 512 on CPU, 2048 on TPU and GPU."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """fcfs: first come, first served. priority: lower `priority` first, then first come."""
    enable_prefix_caching: bool = True
    """Keep the pages of finished prompts and share them with prompts that begin alike."""
    max_queued_requests: int = 1024
    """Requests that may wait; one more is refused with 503 and Retry-After."""

    def __post_init__(self) -> None:
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("max_queued_requests", self.max_queued_requests, 1)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What runs on the device, and how much of it may be used."""

    block_size: int | None = None
    """Tokens in a page of the KV cache. Default: 16 on CPU, 64 on GPU and TPU, more where a TPU could not hold the page
    table."""
    num_kv_pages: int | None = None
    """Pages in the KV cache. Default: what the memory budget leaves after weights and workspace."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the KV cache. auto: that of the activations; on CPU float16, unless the weights are float32. Another one
    than the activations' needs the CPU's kernels."""
    memory_utilization: float | None = None
    """Share of the device's memory that may be used. Default: 0.9 on TPU and GPU, 0.5 of the free memory on CPU."""
    attention: str = "auto"
    """Attention kernel by name; auto chooses by platform and says which. On CPU `reference` is XLA for products too."""
    warmup: Literal["full", "min", "lazy"] = "min"
    """Step shapes compiled before the first request. full: all. min: the largest, which can serve anything, and the
    smallest two, which serve a lone user fast; the others follow in the background. lazy: the largest, which sizes the
    memory; each other one is compiled when it is first needed."""
    compile_cache_dir: str | None = None
    """Where compiled steps are kept between runs. Default: $XDG_CACHE_HOME/jaxserve/xla; '' turns it off."""

    def __post_init__(self) -> None:
        _at_least("block_size", self.block_size, 1)
        _at_least("num_kv_pages", self.num_kv_pages, 1)
        if self.memory_utilization is not None and not 0 < self.memory_utilization <= 1:
            raise ConfigError(f"memory_utilization must be in (0, 1], got {self.memory_utilization}")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The front end."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 8000
    """HTTP port; 0 picks a free one and prints it."""
    grpc_port: int | None = None
    """gRPC port; 0 picks a free one. Default: HTTP port + 1 (a free one if that is taken); -1 turns gRPC off."""
    served_model_name: str | None = None
    """Name that requests use. Default: the directory's name or the hub id."""
    in_process: bool = False
    """Run the engine inside the front end's process: for debugging."""
    shutdown_timeout: float = 30.0
    """Seconds that requests in flight get to finish after SIGTERM; a second signal aborts at once."""
    max_body_bytes: int = 16 * 1024 * 1024
    """Largest request body; a larger one is refused with 413."""
    sse_keep_alive_interval: float = 15.0
    """Seconds of silence in a stream after which a comment is sent; 0 turns it off."""

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port"):
            value = getattr(self, name)
            if value is not None and not (-1 if name == "grpc_port" else 0) <= value < 65536:
                raise ConfigError(f"{name} must be in [0, 65535], got {value}")
        for name in ("shutdown_timeout", "sse_keep_alive_interval"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ConfigError(f"{name} must be a number of seconds, 0 or more, got {getattr(self, name)}")
        if self.max_body_bytes < 1024:
            raise ConfigError(f"max_body_bytes must be at least 1024, got {self.max_body_bytes}")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Everything the engine needs; the front end keeps ServerOptions to itself."""

    model: ModelOptions = field(default_factory=ModelOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)


def cache_home() -> Path | None:
    """Where this user's caches of jaxserve lie; None for a user without a home, as in some containers."""
    home = os.path.expanduser("~")
    if home == "~":
        return None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(home) / ".cache") / "jaxserve"


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def option_names(*sections: type) -> dict[str, str]:
    """Every option's field name and the section it belongs to. Raises ConfigError when two sections share one."""
    owners: dict[str, str] = {}
    for section in sections:
        for f in fields(section):
            if f.name in owners:
                raise ConfigError(f"option {f.name} is declared in {owners[f.name]} and {section.__name__}")
            owners[f.name] = section.__name__
    return owners
