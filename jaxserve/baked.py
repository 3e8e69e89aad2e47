"""A compile cache that `jaxserve compile` filled: what its programs were made for, and what differs at a start."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jaxserve.compile_cache import MANIFEST, surroundings
from jaxserve.errors import ConfigError

log = logging.getLogger("jaxserve.compile_cache")

_SHOWN = 32
"""Characters of a value that is worth showing whole."""


def check_target(directory: str) -> Path:
    """The directory to fill. Raises ConfigError for a url, and for one that holds anything but an attempt before."""
    if "://" in directory:
        raise ConfigError(
            f"{directory} is a url; give a folder, which may be that of a mounted bucket, and copy it to where it is "
            "to be served from"
        )
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = sorted(p.name for p in path.iterdir() if p.name != "programs")
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}") from error
    if held:
        raise ConfigError(f"{path} holds {held[0]} already; name another directory, or remove it")
    return path


def write_manifest(directory: Path, made_for: Mapping[str, object], options: Mapping[str, object]) -> None:
    """Says that the directory is complete: what the programs depend on, and the options that were given."""
    found = {"made_for": made_for, "made_with": surroundings(), "options": options}
    (directory / MANIFEST).write_text(json.dumps(found, indent=1) + "\n")


@cache  # once, however many replicas there are
def _warn(message: str) -> None:
    log.warning(message)


def report(directory: str, made_for: Callable[[], Mapping[str, object]]) -> None:
    """Logs what `differences` finds in a directory that was filled ahead. For any other nothing is worked out."""
    path = Path(directory, MANIFEST)
    if not directory or not path.exists():
        return
    found = differences(path, made_for())
    if found:
        _warn(f"what this start needs is not all in {directory} and is compiled: {'; '.join(found)}")


def differences(path: Path, made_for: Mapping[str, object]) -> list[str]:
    """What of this start the programs beside the manifest `path` were not made for.

    Each is a sentence's part: "max_num_seqs is 64 there and 32 here".
    """
    try:
        there = json.loads(path.read_bytes())
        before: dict[str, Any] = {**there["made_with"], **there["made_for"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path} cannot be read: {error}"]
    now: dict[str, Any] = json.loads(json.dumps({**surroundings(), **made_for}))  # tuples are lists there
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [_difference(name, before.get(name), now.get(name)) for name in names]


def _difference(name: str, before: Any, now: Any) -> str:
    if max(len(str(before)), len(str(now))) <= _SHOWN:
        return f"{name} is {before} there and {now} here"
    words, others = set(str(before).split()), set(str(now).split())
    if max(len(words), len(others)) == 1:  # a digest
        return f"{name} is another"
    only = [
        f"only {place}: {' '.join(sorted(w))}" for place, w in (("there", words - others), ("here", others - words))
    ]
    return f"{name} differ, {', '.join(only)}"
