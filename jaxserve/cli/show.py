"""`jaxserve show`: what a model file or directory holds, read without JAX and without touching a weight."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from jaxserve.hub import resolve_model

if TYPE_CHECKING:
    from jaxserve.gguf import GgufFile
    from jaxserve.weights import Checkpoint

_FIRST = 6  # elements of an array that are shown
_WIDE = 96  # characters of a text that are shown


def show(model: str, *, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> int:
    """Print what a model is: its architecture, size and types, its metadata, and its tensors.

    Parameters
    ----------
    model
        GGUF file (the first one of a split), local directory, or Hugging Face id; jaxserve-tiny is the embedded model.
    as_json
        Print JSON.
    """
    found = about(resolve_model(model))
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print("\n".join(lines(found)))
    return 0


def about(path: Path) -> dict[str, Any]:
    """What is shown, ready for JSON. Raises ConfigError where there is no checkpoint, CheckpointError for damage.

    A GGUF whose architecture is not served is described all the same; `not_served` says why.
    """
    from jaxserve.gguf import GgufFile, find_gguf
    from jaxserve.weights import open_checkpoint

    file = find_gguf(path)
    return _about_directory(open_checkpoint(path)) if file is None else _about_gguf(GgufFile(file))


def _about_gguf(file: "GgufFile") -> dict[str, Any]:
    from jaxserve.errors import ConfigError
    from jaxserve.weights.gguf import make_config

    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    try:
        make_config(file)
        problem = None
    except ConfigError as error:
        problem = error.message
    tensors = [_tensor(name, t.shape, t.format.name, t.nbytes) for name, t in file.tensors.items()]
    return {
        "model": str(file.path),
        "kind": f"GGUF version {file.version}" + (f" in {len(file.files)} files" if len(file.files) > 1 else ""),
        "name": _plain(metadata.get("general.name")),
        "architecture": _plain(architecture),
        "not_served": problem,
        "context_length": _plain(metadata.get(f"{architecture}.context_length")),
        "embedding_length": _plain(metadata.get(f"{architecture}.embedding_length")),
        **_totals(tensors),
        "license": _first_line(metadata.get("general.license") or metadata.get("general.license.name")),
        "chat_template": bool(metadata.get("tokenizer.chat_template")),
        "metadata": {key: _plain(value) for key, value in metadata.items()},
        "tensors": tensors,
    }


def _about_directory(checkpoint: "Checkpoint") -> dict[str, Any]:
    from jaxserve.chat import load_chat_template
    from jaxserve.weights.safetensors import SafetensorsCheckpoint

    path, config = checkpoint.path, checkpoint.config
    types = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    tensors = []
    for name in sorted(checkpoint.names(), key=_by_number):
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        tensors.append(_tensor(name, shape, types.get(dtype.name, dtype.name), checkpoint.nbytes(name)))
    licences = [p for p in sorted(path.glob("LICENSE*")) if p.is_file()]
    return {
        "model": str(path),
        "kind": "safetensors" if isinstance(checkpoint, SafetensorsCheckpoint) else "Orbax",
        "name": path.resolve().name,
        "architecture": ", ".join(map(str, config.get("architectures") or [])) or None,
        "context_length": _plain(config.get("max_position_embeddings")),
        "embedding_length": _plain(config.get("hidden_size")),
        **_totals(tensors),
        "license": _first_line(licences[0].read_text(errors="replace")) if licences else None,
        "chat_template": load_chat_template(path) is not None,
        "metadata": {key: _plain(value) for key, value in config.items()},
        "tensors": tensors,
    }


def _tensor(name: str, shape: tuple[int, ...], kind: str, nbytes: int) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "type": kind, "bytes": nbytes}


def _totals(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums over all tensors, and over those of each type, the largest first."""
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        one = types.setdefault(tensor["type"], {"tensors": 0, "parameters": 0, "bytes": 0})
        one["tensors"] += 1
        one["parameters"] += math.prod(tensor["shape"])
        one["bytes"] += tensor["bytes"]
    return {
        "parameters": sum(one["parameters"] for one in types.values()),
        "bytes": sum(one["bytes"] for one in types.values()),
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["parameters"])),
    }


def _plain(value: Any) -> Any:
    """A value of metadata for JSON: a long array as its length and first elements, what JSON lacks as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    first = value[:_FIRST]
    first = [_plain(v) for v in (first if isinstance(first, list) else first.tolist())]
    return first if len(value) <= _FIRST else {"length": len(value), "first": first}


def _first_line(text: Any) -> str | None:
    return next((line.strip() for line in text.splitlines() if line.strip()), None) if isinstance(text, str) else None


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Orders layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What `about` found, for people."""
    count = len(found["tensors"])
    types = (
        f"{name} {100 * one['parameters'] / max(found['parameters'], 1):.3g} % ({one['tensors']} tensors)"
        for name, one in found["types"].items()
    )
    rows = [
        ("kind", found["kind"]),
        ("name", found["name"]),
        ("architecture", found["architecture"]),
        ("parameters", f"{found['parameters']:,}"),
        ("bytes", f"{found['bytes']:,}"),
        ("types", ", ".join(types)),
        ("context length", found["context_length"]),
        ("embedding length", found["embedding_length"]),
        ("license", found["license"]),
        ("chat template", "yes" if found["chat_template"] else "no"),
    ]
    if found.get("not_served"):
        rows.append(("not served", found["not_served"]))
    yield _text(found["model"])
    for label, value in rows:
        yield f"  {label:<18} {'not given' if value is None else _text(value)}"
    yield "Metadata"
    width = max(map(len, found["metadata"]), default=0)
    for key, value in found["metadata"].items():
        yield f"  {_text(key):<{width}} {_short(value)}"
    yield "Tensors"
    shapes = ["x".join(map(str, tensor["shape"])) for tensor in found["tensors"]]
    names, sizes = max((len(t["name"]) for t in found["tensors"]), default=0), max(map(len, shapes), default=0)
    for tensor, shape in zip(found["tensors"], shapes, strict=True):
        yield f"  {_text(tensor['name']):<{names}} {shape:>{sizes}} {tensor['type']:<8} {tensor['bytes']:>15,}"
    yield f"  {count} tensors, {found['parameters']:,} parameters, {found['bytes']:,} bytes"


def _short(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"length", "first"}:
        return f"{value['length']} of {', '.join(_short(v) for v in value['first'])}, ..."
    if isinstance(value, list):
        return f"[{', '.join(_short(v) for v in value)}]"
    if isinstance(value, float):
        return f"{value:.7g}"  # as much as most, being float32, mean
    text = _text(value)
    return text if len(text) <= _WIDE else f"{text[:_WIDE]}... ({len(text)} characters)"


def _text(value: Any) -> str:
    """One line that a terminal may be given: what a file says must neither steer it nor fail to encode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
