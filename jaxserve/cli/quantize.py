"""`jaxserve quantize`: any checkpoint or GGUF file, written as one GGUF file in another format."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.hub import resolve_model

if TYPE_CHECKING:
    import numpy as np

    from jaxserve.formats import Format
    from jaxserve.weights.gguf_export import SourceTensor
    from jaxserve.weights.mixes import Choice

_PIECE = 1 << 20
"""Weights that one thread works on at a time."""
_QUANTISATION_VERSION = 2  # of ggml's block formats


@dataclass(frozen=True)
class _Source:
    """A model to be written."""

    metadata: dict[str, Any]
    tensors: "dict[str, SourceTensor]"
    layers: int
    sharing: int
    """Query heads of a key-value head."""
    experts: int
    """Of a layer; 0 without."""


def quantize(src: str, dst: Path, type: str, *, threads: int | None = None, revision: str | None = None) -> int:
    """Write a model as a GGUF file in a format of fewer bits, or of more.

    Parameters
    ----------
    src
        GGUF file (the first one of a split), local directory (safetensors or Orbax), or Hugging Face id.
    dst
        File to write; it must not exist.
    type
        A format (F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, Q6_K, Q2_K, IQ4_NL, IQ4_XS, MXFP4) or a mix of them
        (Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, Q3_K_M; Q5_K, Q4_K and Q3_K mean the _M).
    threads
        How many compute at once. Default: all processors.
    revision
        Branch, tag or commit of a Hugging Face id.
    """
    from jaxserve.weights.gguf_write import write_gguf
    from jaxserve.weights.mixes import MIXES, choose

    mix = MIXES.get(type.upper())
    if mix is None:
        raise ConfigError(f"type {type!r} is not known; known are {', '.join(MIXES)}")
    count = threads if threads is not None else (os.cpu_count() or 1)
    if count < 1:
        raise ConfigError(f"threads must be at least 1, got {count}")
    begun = time.monotonic()
    source = _open(src, revision)
    choices = choose(
        mix,
        {name: (tensor.format, tensor.shape) for name, tensor in source.tensors.items()},
        layers=source.layers,
        sharing=source.sharing,
        experts=source.experts,
    )
    for line in _remarks(source.tensors, choices):
        print(line, file=sys.stderr)
    metadata = source.metadata | {
        "general.quantization_version": _QUANTISATION_VERSION,
        "general.file_type": mix.file_type,
    }
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        ThreadPoolExecutor(count, thread_name_prefix="quantize") as pool,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        tensors = [_to_write(name, tensor, choices[name], pool, count) for name, tensor in source.tensors.items()]
        task = bar.add_task("writing", total=sum(tensor.nbytes for tensor in tensors))
        write_gguf(
            dst,
            metadata,
            tensors,
            progress=lambda written, name: bar.update(task, completed=written, description=name),
        )
    print("\n".join(_table(source.tensors, choices)))
    print(f"wrote {dst}, {_bytes(dst.stat().st_size)}, in {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return 0


def _open(src: str, revision: str | None) -> _Source:
    from jaxserve.gguf import find_gguf

    path = resolve_model(src, revision)
    file = find_gguf(path)
    return _open_checkpoint(path, Path(src).expanduser().resolve().name) if file is None else _open_gguf(file)


def _open_gguf(path: Path) -> _Source:
    from jaxserve.gguf import GgufFile
    from jaxserve.weights.gguf_export import gguf_tensors

    file = GgufFile(path)
    metadata = {key: value for key, value in file.metadata.items() if not key.startswith("split.")}
    architecture = metadata.get("general.architecture")

    def whole(key: str) -> int:
        value = metadata.get(f"{architecture}.{key}")
        # A list has a number for each layer: the rules ask for the most common kind only.
        value = value if isinstance(value, int) or value is None else int(max(value))
        return value or 0

    heads = whole("attention.head_count")
    return _Source(
        metadata,
        gguf_tensors(file),
        whole("block_count"),
        heads // (whole("attention.head_count_kv") or heads or 1),
        whole("expert_count"),
    )


def _open_checkpoint(path: Path, name: str) -> _Source:
    from jaxserve.chat import load_chat_template
    from jaxserve.tokenizer.gguf_export import text_metadata
    from jaxserve.weights import open_checkpoint
    from jaxserve.weights.gguf_export import hf_tensors, hyperparameters, size_label

    checkpoint = open_checkpoint(path)
    try:
        hyper = hyperparameters(checkpoint.config)
    except KeyError as error:
        raise ConfigError(f"{path}: config.json lacks {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error
    tensors = hf_tensors(checkpoint)
    embed = tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(f"{path} holds no embedding, so it is not a whole model")
    template = load_chat_template(path)
    weights = sum(tensor.nbytes // tensor.format.nbytes for tensor in tensors.values())
    general = {"general.name": name, "general.size_label": size_label(weights)}
    architecture, kind, *others = hyper.items()
    metadata = dict([architecture, kind]) | general | dict(others)
    metadata |= text_metadata(path, embed.shape[0], template.sources if template else {})
    heads, kv_heads = (hyper[f"{architecture[1]}.attention.{key}"] for key in ("head_count", "head_count_kv"))
    layers, experts = hyper[f"{architecture[1]}.block_count"], hyper.get(f"{architecture[1]}.expert_count", 0)
    return _Source(metadata, tensors, layers, heads // kv_heads, experts)


def _to_write(name: str, source: "SourceTensor", choice: "Choice", pool: ThreadPoolExecutor, threads: int) -> Any:
    from jaxserve.weights.gguf_write import TensorToWrite

    step = max(1, _PIECE // source.shape[-1])

    def rows() -> "Iterator[np.ndarray]":
        # In order, a few pieces ahead of the file: memory does not grow with the tensor.
        ahead: list[Future[np.ndarray]] = []
        for begin in range(0, source.rows, step):
            ahead.append(pool.submit(_piece, name, source, choice.format, begin, min(begin + step, source.rows)))
            if len(ahead) > 2 * threads:
                yield ahead.pop(0).result()
        for piece in ahead:
            yield piece.result()

    return TensorToWrite(name, choice.format, source.shape, rows)


def _piece(name: str, source: "SourceTensor", target: "Format", begin: int, end: int) -> "np.ndarray":
    """Some rows in the new format, uint8 [end - begin, row_bytes]."""
    from jaxserve.formats import dequantise, quantise

    raw = source.raw(slice(begin, end))
    if source.format == target:
        return raw
    try:
        return quantise(target, dequantise(source.format, raw), first=begin)
    except ValueError as error:
        raise CheckpointError(f"tensor {name}: {error}") from error


def _remarks(tensors: "Mapping[str, SourceTensor]", choices: "Mapping[str, Choice]") -> Iterator[str]:
    """What a user should know of the choices."""
    short = Counter(
        (choice.instead_of, choice.format, tensors[name].shape[-1])
        for name, choice in choices.items()
        if choice.instead_of is not None
    )
    for (wanted, found, length), count in short.items():
        many = f"{count} tensors have" if count > 1 else "1 tensor has"
        unfilled = f"rows of {length}, which blocks of {wanted.block} do not fill"
        yield f"{many} {unfilled}: {found.name} instead of {wanted.name}"
    again = {t.format.name for name, t in tensors.items() if t.format.quantised and t.format != choices[name].format}
    if again:
        yield f"the source is quantised already ({', '.join(sorted(again))}): its errors and the new ones add up"


def _table(tensors: "Mapping[str, SourceTensor]", choices: "Mapping[str, Choice]") -> Iterator[str]:
    """Tensors and bytes before and after, by the format after."""
    counts: Counter[str] = Counter()
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for name, tensor in tensors.items():
        target = choices[name].format
        counts[target.name] += 1
        before[target.name] += tensor.nbytes
        after[target.name] += tensor.rows * target.row_bytes(tensor.shape[-1])
    yield f"{'format':8}{'tensors':>8}{'before':>12}{'after':>12}"
    for name in sorted(counts, key=lambda name: -after[name]):
        yield f"{name:8}{counts[name]:>8}{_bytes(before[name]):>12}{_bytes(after[name]):>12}"
    yield f"{'all':8}{counts.total():>8}{_bytes(before.total()):>12}{_bytes(after.total()):>12}"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.4g} GB"
