"""Every setting, once: these dataclasses are the command line's flags, the JAXSERVE_* variables and the TOML keys.

Field names follow vLLM's flags for what vLLM has. None means "worked out from the model and the machine",
and what was worked out is printed at start-up.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from jaxserve.errors import ConfigError

DEFAULT_MODEL_NAME = "jaxserve-tiny"

OFFLINE_DECODE_STEPS = 16
"""Default where nobody reads along."""
MAX_DECODE_STEPS = 256

_MESH_CURE = "give MODEL (4), DATAxMODEL (2x4) or names (data=2,model=4)"


@dataclass(frozen=True)
class MeshShape:
    """How many devices there are along each axis: `data` replicas of the engine, each of `expert` * `model` devices."""

    data: int = 1
    expert: int = 1
    model: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """From "4" (model), "2x4" (data, model) or "data=2,model=4,expert=2". Raises ConfigError for anything else."""
        if "=" in text:
            pairs = [part.partition("=")[::2] for part in text.split(",")]
            names, sizes = [name.strip() for name, _ in pairs], [size.strip() for _, size in pairs]
            known = [f.name for f in fields(cls)]
            if bad := [name for name in names if name not in known]:
                raise ConfigError(f"mesh {text!r}: unknown axis {bad[0]!r}; axes are {', '.join(known)}")
            if len(set(names)) != len(names):
                raise ConfigError(f"mesh {text!r} names an axis twice; {_MESH_CURE}")
        else:
            sizes = text.split("x")
            names = ["model"] if len(sizes) == 1 else ["data", "model"]
        counts = all(n.isascii() and n.isdigit() and 0 < int(n) < 10**6 for n in sizes)
        if not counts or len(names) != len(sizes):
            raise ConfigError(f"mesh {text!r} is no shape; {_MESH_CURE}")
        return cls(**{name: int(n) for name, n in zip(names, sizes, strict=True)})

    @property
    def per_replica(self) -> int:
        """Devices of one replica."""
        return self.expert * self.model

    @property
    def devices(self) -> int:
        return self.data * self.per_replica

    def __str__(self) -> str:
        named = f"data={self.data},expert={self.expert},model={self.model}"
        return f"{self.data}x{self.model}" if self.expert == 1 else named


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and in what precision."""

    model: str | None = None
    """Local directory (safetensors or Orbax), GGUF file or Hugging Face id (org/repo, or of GGUF files org/repo:Q4_K_M
    or org/repo/file.gguf); without it the embedded model is served."""
    model_code: str | None = None
    """Python file of a model of your own, or a module's name, that computes the checkpoint; `my_model.py:NAME` takes an
    object of it. Whatever the checkpoint's architecture is called. The file is executed: give none that you do not
    trust."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    task: Literal["auto", "generate", "embed"] = "auto"
    """What the model is for. auto: to give embeddings if it is an encoder, or says so (modules.json beside config.json,
    pooling_type in a GGUF file, no output matrix), otherwise to generate."""
    pooling: Literal["last", "mean", "cls"] | None = None
    """Which hidden state is the embedding: the last token's, the mean of all, the first token's. Default: what the
    checkpoint says; last for decoders, which have no other."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of activations and of plain weights. auto: float32 on CPU, whose kernels multiply matrices in the type
    that the checkpoint stores, bfloat16 on TPU and GPU."""
    quantization: Literal["q8_0", "q6_k", "q5_k", "q4_k", "q4_0"] | None = None
    """Quantise the matrices of a plain checkpoint at load, to a block format of GGUF; on TPU, GPU and meshes to q8_0,
    q4_k or q4_0. The K formats take a minute or two a billion weights: `jaxserve quantize` does it once and for all."""
    max_model_len: int | None = None
    """Longest prompt plus completion, in tokens. Default: what the model was made for, if the memory holds it."""

    def __post_init__(self) -> None:
        _at_least("max_model_len", self.max_model_len, 1)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How requests share the steps."""

    max_num_seqs: int | None = None
    """Sequences computed at once, by each replica of a mesh. Default: 64 on CPU, 256 on TPU and GPU."""
    max_num_batched_tokens: int | None = None
    """Token budget of a step: while others are answered, no prompt takes more at once. Default: 2048 on TPU and GPU; on
    CPU 512 for models below 0.1 B weights, less for larger ones, down to two a sequence."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """fcfs: first come, first served. priority: lower `priority` first, then first come."""
    enable_prefix_caching: bool = True
    """Keep the pages of finished prompts and share them with prompts that begin alike."""
    decode_steps: int = 1
    """Most decode steps that one launch takes, while no prompt can be taken in: more tokens a second, since the host
    works once for all of them. They come in groups of so many, what arrives meanwhile waits for a group or two, and
    requests are cancelled between groups."""
    max_queued_requests: int = 1024
    """Requests that may wait, at each replica of a mesh; one more is refused with 503 and Retry-After."""

    def __post_init__(self) -> None:
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("decode_steps", self.decode_steps, 1)
        if self.decode_steps > MAX_DECODE_STEPS:
            raise ConfigError(f"decode_steps must be at most {MAX_DECODE_STEPS}, got {self.decode_steps}")
        _at_least("max_queued_requests", self.max_queued_requests, 1)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What runs on the device, and how much of it may be used."""

    mesh: str | None = None
    """Devices to use, as DATAxMODEL: 2x4 is two replicas of the engine, each on four devices that share the weights,
    attention heads and KV cache between them (tensor parallel). 4 is 1x4. By names also the number of groups that the
    experts of a mixture are divided into: data=1,model=2,expert=4. Default: one device."""
    block_size: int | None = None
    """Tokens in a page of the KV cache. Default: 16 on CPU, 64 on GPU and TPU, more where a TPU could not hold the page
    table."""
    num_kv_pages: int | None = None
    """Pages in the KV cache of a replica; a page holds block_size tokens, of a model that has layers with and without
    sliding windows those of one group of layers. Default: what the memory budget leaves after weights and workspace; on
    CPU no more than a sequence of the longest context, or 512 tokens of each of max_num_seqs, take."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8_e4m3", "float8_e4m3fn"] = "auto"
    """Type of the KV cache. auto: that of the activations; on CPU float16, unless the weights are float32. Another one
    than the activations' needs the CPU's kernels. int8: bytes, with one scale a token, head, and of K and V; half the
    memory of 16 bits, for a little accuracy, on any device. fp8_e4m3 (or float8_e4m3fn): floats of 8 bits without
    scales, less accurate; not with the CPU's kernels."""
    memory_utilization: float | None = None
    """Share of the device's memory that may be used; of a GPU, of what JAX sets aside: 0.88 of it, unless
    XLA_CLIENT_MEM_FRACTION says otherwise. Default: 0.9 on TPU and GPU, 0.5 of the free memory on CPU."""
    attention: str = "auto"
    """Attention kernel by name; auto chooses by platform and says which. On CPU `reference` is XLA for products too."""
    warmup: Literal["full", "min", "lazy"] = "min"
    """Step shapes compiled before the first request. full: all. min: the largest, which can serve anything, and the
    smallest two, which serve a lone user fast; the others follow in the background. lazy: the largest, which sizes the
    memory; each other one is compiled when it is first needed."""
    compile_cache_dir: str | None = None
    """Where compiled steps are kept between runs: a folder, perhaps one that `jaxserve compile` has filled. Default:
    $XDG_CACHE_HOME/jaxserve/xla; '' turns it off."""

    @property
    def kv_dtype(self) -> str:
        """kv_cache_dtype as JAX calls it, or auto."""
        return "float8_e4m3fn" if self.kv_cache_dtype == "fp8_e4m3" else self.kv_cache_dtype

    def __post_init__(self) -> None:
        if self.mesh is not None:
            MeshShape.parse(self.mesh)
        _at_least("block_size", self.block_size, 1)
        _at_least("num_kv_pages", self.num_kv_pages, 1)
        if "://" in (self.compile_cache_dir or ""):
            raise ConfigError(
                f"compile_cache_dir {self.compile_cache_dir} is a url; give a folder: mount the bucket, or copy it"
            )
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
    admin_key: str | None = None
    """Key that /admin asks for, as `Authorization: Bearer KEY`; without one there is no /admin. Better given as
    JAXSERVE_ADMIN_KEY, since others can read a command line."""
    reload: bool = False
    """Watch the file of --model-code: an edit is compiled in the background and then switched to; a broken one is
    reported, and the old code goes on."""
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
        if self.admin_key is not None and not (self.admin_key.isascii() and len(self.admin_key.split()) == 1):
            raise ConfigError("admin_key must be of ASCII letters, digits and signs, without blanks")
        if self.max_body_bytes < 1024:
            raise ConfigError(f"max_body_bytes must be at least 1024, got {self.max_body_bytes}")


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Several hosts whose devices are one mesh; the same command runs on each of them."""

    hosts: int | Literal["auto"] = 1
    """Hosts that compute the model together, --mesh being that of all their devices. auto: as many as LeaderWorkerSet,
    Cloud TPU (GKE) or Slurm says in its variables, which also say what is left out of the next two."""
    host_index: int | None = None
    """Which of the hosts this one is, from 0. Host 0 serves requests and plans; the others compute with it."""
    coordinator: str | None = None
    """Address of host 0 for the other hosts, HOST or HOST:PORT (8900). JAX takes the port after it, or a free one."""
    host_secret: str | None = None
    """What the hosts know each other by, the same on each: messages between them are signed with it, not encrypted.
    Better given as JAXSERVE_HOST_SECRET, since others can read a command line."""
    host_timeout: float = 10.0
    """Seconds that a host may be silent, or behind with a step, before it is given up and all hosts start again."""
    host_start_timeout: float = 600.0
    """Seconds that the hosts wait for each other at a start."""

    def __post_init__(self) -> None:
        if isinstance(self.hosts, int):
            _at_least("hosts", self.hosts, 1)
        _at_least("host_index", self.host_index, 0)
        for name in ("host_timeout", "host_start_timeout"):
            if not 0 < getattr(self, name) < 1e9:
                raise ConfigError(f"{name} must be a number of seconds above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class HostPlace:
    """Which of several hosts this is, and where host 0 is; what HostOptions and the environment say together."""

    index: int
    count: int
    coordinator: str
    """Name or IP address of host 0."""
    port: int
    secret: str = field(repr=False)
    timeout_s: float = HostOptions.host_timeout
    start_timeout_s: float = HostOptions.host_start_timeout


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where on Ray the engines of a job run."""

    ray_address: str | None = None
    """Address of a Ray cluster that this machine is part of, or auto. Default: $RAY_ADDRESS, else a Ray of its own on
    this machine."""
    workers: int | None = None
    """Engines. Default: as many as the cluster has room for."""
    worker_resources: str | None = None
    """What Ray sets aside for an engine, as CPU=4,GPU=1,NAME=AMOUNT. Default: as many GPUs or TPU chips as the mesh has
    devices; in a cluster that has neither, an equal share of the CPUs, one engine a host unless --workers says more."""

    def __post_init__(self) -> None:
        _at_least("workers", self.workers, 1)
        if self.ray_address is not None and "://" in self.ray_address:
            raise ConfigError(
                f"ray_address {self.ray_address!r}: a job keeps its output on a machine of the cluster. Run it there, "
                "with `ray job submit` for instance, and give auto"
            )
        if self.worker_resources is not None:
            parse_resources(self.worker_resources)


def parse_resources(text: str) -> dict[str, float]:
    """Amounts by name, from "CPU=4,GPU=1". Raises ConfigError for anything else."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = (word.strip() for word in part.partition("="))
        try:
            number = float(amount)
        except ValueError:
            number = -1.0
        if not name or name in found or not 0 <= number < 10**6:
            raise ConfigError(f"resources {text!r}: give NAME=AMOUNT, each name once, for instance CPU=4,GPU=1")
        found[name] = number
    return found


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Everything the engine needs; the front end keeps ServerOptions to itself."""

    model: ModelOptions = field(default_factory=ModelOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    capture: tuple[str, ...] = ()
    """Shell patterns of the inner values that come with every token; no option of a server. See taps.py."""
    place: HostPlace | None = None
    """Among several hosts; None: there is this one."""

    def __post_init__(self) -> None:
        if not all(isinstance(pattern, str) and pattern for pattern in self.capture):
            raise ConfigError(f"capture must be names of values, with * for any text, got {self.capture!r}")
        if self.capture and self.place is not None:
            raise ConfigError("capture is served on one host only; leave it out, or the other hosts")


def authority(host: str, port: int) -> str:
    """HOST:PORT as urls and gRPC have it, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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


def engine_options_of(model: str | None, given: Mapping[str, Any]) -> EngineOptions:
    """Engine options from the names and values of any of their fields, and `capture`, a pattern or a list of them.

    Raises ConfigError for another name, and for a value of another type.
    """
    sections = (ModelOptions, ScheduleOptions, DeviceOptions)
    known = option_names(*sections) | {"capture": EngineOptions.__name__}
    if unknown := sorted(given.keys() - known.keys()):
        raise ConfigError(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    for section in sections:
        for name, hint in get_type_hints(section).items():
            if name in given:
                _check_type(name, given[name], hint)
    parts = [{f.name: given[f.name] for f in fields(s) if f.name in given} for s in sections]
    return EngineOptions(
        model=ModelOptions(**(parts[0] | {"model": model})),
        schedule=ScheduleOptions(**parts[1]),
        device=DeviceOptions(**parts[2]),
        capture=_patterns(given.get("capture", ())),
    )


def _check_type(name: str, value: Any, hint: Any) -> None:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        wanted = f"must be one of {choices}, got {value!r}" if (choices := choices_of(hint)) else f"is wrong: {error}"
        raise ConfigError(f"{name} {wanted}") from None


def choices_of(hint: Any) -> str:
    """What a type allows that is a Literal, or has one among others, in words; "" of any other type."""
    return ", ".join(repr(c) for h in (hint, *get_args(hint)) if get_origin(h) is Literal for c in get_args(h))


def _patterns(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def model_name(model: str | None, served_model_name: str | None = None) -> str:
    """The name that requests use: the one given, the directory's or file's, the hub id, or the embedded model's."""
    if served_model_name:
        return served_model_name
    if model is None:
        return DEFAULT_MODEL_NAME
    path = Path(model)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model
