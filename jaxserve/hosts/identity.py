"""What the hosts of one engine must have alike, in words that can be compared."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, ScheduleOptions
from jaxserve.fingerprint import checkpoint_digest, code_version
from jaxserve.model_code import sources_digest

# Where things lie may differ, what lies there may not.
_PLACES = ("model", "model_code", "revision", "compile_cache_dir")
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "ml_dtypes", "numpy")


def describe(options: EngineOptions, path: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All that the launches of an engine depend on, by name."""
    assert options.place is not None
    found = {"hosts": str(options.place.count), "machine": platform.machine(), "jaxserve": code_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    found["checkpoint"] = checkpoint_digest(path)
    found["model code"] = sources_digest(options.model.model_code)
    sections: tuple[tuple[type, Any], ...] = (
        (ModelOptions, options.model),
        (ScheduleOptions, options.schedule),
        (DeviceOptions, options.device),
    )
    for section, given in sections:
        found |= {f.name: str(getattr(given, f.name)) for f in fields(section) if f.name not in _PLACES}
    # Programs are compiled by these; JAX's caches, and what it is told of processes, are each host's own.
    for name, value in environ.items():
        if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") or (
            name.startswith("JAX_") and not any(word in name for word in ("CACHE", "COORDINATOR", "PROCESS", "LOCAL"))
        ):
            found[name] = value
    return found


def differences(leader: Mapping[str, str], follower: Mapping[str, str]) -> list[str]:
    """What a follower has otherwise than its leader."""
    return [
        f"{name} is {follower.get(name, 'not set')} there, {leader.get(name, 'not set')} on host 0"
        for name in sorted(leader.keys() | follower.keys())
        if leader.get(name) != follower.get(name)
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not there"
