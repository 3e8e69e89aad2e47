"""The files that a command reads and writes line by line; - is standard input, or standard output."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from jaxserve.errors import ConfigError

STANDARD = Path("-")

_TEXTS = ("--stop", "--delimiter")
"""Options whose value is no file."""


def with_dashes_as_paths(argv: Sequence[str]) -> list[str]:
    """The words of a command with ./- for -, which is the same Path: cyclopts takes a lone dash for an option."""
    before = itertools.chain([""], argv)
    return ["./-" if word == "-" and last not in _TEXTS else word for last, word in zip(before, argv, strict=False)]


def open_streams(files: contextlib.ExitStack, source: Path, target: Path) -> tuple[IO[bytes], IO[bytes]]:
    """What is read and what is written; `files` closes them. Raises ConfigError, and then nothing was written over."""
    refuse_same(source, target)
    with said():
        lines = sys.stdin.buffer if source == STANDARD else files.enter_context(source.open("rb"))
        return lines, sys.stdout.buffer if target == STANDARD else files.enter_context(target.open("wb"))


def refuse_same(source: Path, target: Path) -> None:
    """Raises ConfigError if `target` is the file that is read: opening it to write would empty it."""
    if STANDARD not in (source, target) and source.exists() and target.exists() and source.samefile(target):
        raise ConfigError(f"{target} is the input, and writing would erase it; name another output")


@contextlib.contextmanager
def said() -> Iterator[None]:
    """OSErrors as ConfigErrors that name the file."""
    try:
        yield
    except OSError as e:
        raise ConfigError(f"cannot open {e.filename}: {e.strerror}") from e
