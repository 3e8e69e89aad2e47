"""Devices that are only described: a slice of TPU chips or some GPUs that programs are compiled for without having any.

`environment` comes before JAX is imported; nothing here imports it before `devices`.
"""

import importlib.metadata
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError
from jaxserve.host_memory import host_memory
from jaxserve.planning.chips import CHIPS, Chip, accepted

if TYPE_CHECKING:
    import jax

_MOST_CPUS = 64


@dataclass(frozen=True)
class Topology:
    """So many devices of a chip."""

    chip: Chip
    size: str

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """From "v5e:2x4", "h100:8" or "cpu:8". Raises ConfigError with what is accepted."""
        name, _, size = text.partition(":")
        if name == "cpu" and size.isascii() and size.isdigit() and 0 < int(size) <= _MOST_CPUS:
            return cls(_cpu(int(size)), size)
        chip = CHIPS.get(name)
        if chip is None or size not in chip.sizes:
            raise ConfigError(f"topology {text!r} is not known; known are {accepted()}")
        return cls(chip, size)

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.size}"

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.size.split("x"))

    @property
    def count(self) -> int:
        """Devices."""
        return math.prod(self.dims)

    @property
    def hosts(self) -> int:
        """Machines that they are in."""
        return 1 if self.count <= self.chip.alone else -(-self.count // self.chip.host)

    @property
    def capability(self) -> str | None:
        """A GPU's compute capability."""
        gpu = _GPUS.get(self.chip.name)
        return None if gpu is None else f"{gpu.capability[0]}.{gpu.capability[1]}"

    def devices(self) -> "list[jax.Device]":
        """As JAX describes them. Raises ConfigError where their compiler is not installed, or does not take them."""
        check_compiler(self)
        import jax
        from jax.experimental import topologies

        if self.chip.platform == "cpu":
            found = jax.local_devices(backend="cpu")
            if len(found) < self.count:
                flag = f"--xla_force_host_platform_device_count={self.count}"
                raise ConfigError(f"topology {self} needs a process with as many CPU devices: set XLA_FLAGS={flag}")
            return found[: self.count]
        try:
            if self.chip.platform == "tpu":
                # By default libtpu takes a host to have 2x2 chips.
                bounds: Any = {"chips_per_host_bounds": [*self.dims, 1][:3]} if self.hosts == 1 else {}
                return list(topologies.get_topology_desc(str(self), "tpu", **bounds).devices)
            return list(
                topologies.get_topology_desc(
                    "", "cuda", target_config=_gpu_target(self.chip), topology=f"1x1x{self.count}"
                ).devices
            )
        except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            raise ConfigError(f"topology {self}: the compiler does not take it: {error}") from error


def environment(logs: Path, cpus: int = 0) -> dict[str, str]:
    """Variables to be set before JAX is imported: look for no device, let other processes compile too, log to `logs`;
    and have so many CPU devices, if any."""
    found = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # which could load no program for a device that is not here
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": str(logs),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if cpus:
        flag = f"--xla_force_host_platform_device_count={cpus}"
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return found


def check_compiler(topology: Topology) -> None:
    """Raises ConfigError, with what to install, where the compiler for a topology's chips is missing."""
    platform = topology.chip.platform
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"topology {topology} needs the TPU's compiler, which is not installed (no TPU is needed): "
            "pip install 'jaxserve[tpu]'"
        )
    if platform == "gpu" and not all(importlib.util.find_spec(name) for name in ("jax_cuda13_plugin", "jax_plugins")):
        version = importlib.metadata.version("jax")
        raise ConfigError(
            f"topology {topology} needs JAX's plugin for CUDA, which is not installed (no GPU and no CUDA are needed): "
            f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}, or 'jaxserve[cuda]'"
        )


def _cpu(count: int) -> Chip:
    """A part of this machine's memory; nobody says how fast it is."""
    return Chip("cpu", "cpu", host_memory().free // count, 0, 0, 0, None, (), count, count, "this machine")


@dataclass(frozen=True)
class _Gpu:
    """What the compiler wants to know of a GPU besides: the field names are those of XLA's GpuDeviceInfoProto."""

    description: str
    capability: tuple[int, int]
    cores: int
    shared_memory_per_core: int
    l2_cache: int
    memory: int
    clock_ghz: float

    @property
    def shared_memory_per_block(self) -> int:
        return self.shared_memory_per_core - 1024


_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 167936, 40 << 20, 84978434048, 1.41),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 233472, 50 << 20, 84978434048, 1.98),
    "h200": _Gpu("NVIDIA H200", (9, 0), 132, 233472, 60 << 20, 150000000000, 1.98),
}
"""From the CUDA programming guide's table of compute capabilities and the chips' white papers."""


def _gpu_target(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    gpu = _GPUS[chip.name]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_memory_per_core,
        "shared_memory_per_block_optin": gpu.shared_memory_per_block,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": 64 if gpu.capability == (8, 0) else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    major, minor = gpu.capability
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 patch: 0 }}\n'
        f'device_description_str: "{gpu.description}"\n'
    )
