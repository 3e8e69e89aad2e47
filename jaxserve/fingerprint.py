"""What tells checkpoints and versions of the code from others: digests of files."""

import hashlib
import importlib.metadata
from pathlib import Path

import kernels_pallas
from jaxserve import __version__

_SAMPLED_FROM = 64 * 2**20
_SAMPLES, _SAMPLE = 256, 2**16


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


def code_version(*packages: str) -> str:
    """The version of this package with a digest of every source, and those of `packages`."""
    found = hashlib.blake2b(digest_size=6)
    for root in (Path(__file__).parent, *map(Path, kernels_pallas.__path__)):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cc", ".h", ".proto")):
            found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"jaxserve {__version__} ({found.hexdigest()})", *versions])
