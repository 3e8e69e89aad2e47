"""`jaxserve perplexity`: how well a model predicts a text, and how far it is from a reference; llama.cpp's figures."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from jaxserve.cli import options as cli
from jaxserve.cli.progress import reporting
from jaxserve.config import DeviceOptions
from jaxserve.errors import ConfigError
from jaxserve.hub import resolve_model

if TYPE_CHECKING:
    import numpy as np

    from jaxserve.evaluate import Evaluator
    from jaxserve.perplexity import Comparison, Estimate, Scores
    from jaxserve.tokenizer import Tokenizer

_COLUMNS = {"PPL": 24, "ln(PPL / reference PPL)": 26, "KL divergence": 24, "RMS Δp %": 20, "same top %": 20}
"""Of the running estimate, and their widths."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags(cli.ModelFlags):
    """ModelFlags without what only requests need."""

    max_model_len: Annotated[int | None, Parameter(parse=False)] = None


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(DeviceOptions):
    """DeviceOptions without what only a server needs."""

    block_size: Annotated[int | None, Parameter(parse=False)] = None
    num_kv_pages: Annotated[int | None, Parameter(parse=False)] = None
    memory_utilization: Annotated[float | None, Parameter(parse=False)] = None
    warmup: Annotated[Literal["full", "min", "lazy"], Parameter(parse=False)] = "lazy"


def perplexity(
    model: str,
    text: Path,
    *,
    ctx_size: Annotated[int, Parameter(alias="-c")] = 512,
    chunks: int | None = None,
    kl_divergence: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    config: cli.ConfigFile = None,
    models: Annotated[ModelFlags, Parameter(name="*", group=Group("Model", sort_key=1))] = ModelFlags(),
    device: Annotated[DeviceFlags, Parameter(name="*", group=Group("Device", sort_key=3))] = DeviceFlags(),
) -> int:
    """Measure the perplexity of a text, as llama-perplexity does, and what quantising a model has changed.

    The text is cut into chunks of --ctx-size tokens; each begins with BOS where the model wants it, and of each the
    second half is scored. The running estimate is printed as chunks finish.

    Parameters
    ----------
    model
        GGUF file, local directory (safetensors or Orbax), or Hugging Face id.
    text
        UTF-8 text file.
    ctx_size
        Tokens of a chunk.
    chunks
        Most chunks to compute. Default: all.
    kl_divergence
        A reference, named as MODEL is: the model before it was quantised. Compares both models' distributions over the
        whole vocabulary. --revision and --quantization are for MODEL only, all other options for both.
    as_json
        Print JSON; the running estimate goes to stderr.
    config
        TOML file with any of these settings.
    """
    path = resolve_model(model, models.revision)
    reference = None if kl_divergence is None else resolve_model(kl_divergence)
    evaluator, cuts = _open(path, reference, _read(text), ctx_size, chunks, models, device)

    from jaxserve import perplexity as rules

    out = sys.stderr if as_json else sys.stdout  # whoever reads JSON wants the result alone
    print(f"{len(cuts)} chunks of {ctx_size} tokens", file=sys.stderr)
    if reference is not None:
        print("chunk" + "".join(name.rjust(width) for name, width in _COLUMNS.items()), file=out)
    parts: list[Scores] = []
    comparison = None
    for chunk in cuts:
        parts.append(evaluator.score(chunk))
        scores = rules.Scores.join(parts)
        ppl = rules.perplexity(scores.nll)
        if reference is None:
            print(f"[{len(parts)}]{ppl.value:.4f},", end="", file=out, flush=True)
        else:
            comparison = rules.compare(scores)
            print(_row(len(parts), ppl, comparison), file=out, flush=True)
    print(file=out)
    if as_json:
        about = {"model": str(path), "reference": None if reference is None else str(reference), "text": str(text)}
        counts = {"ctx_size": ctx_size, "chunks": len(cuts), "scored_tokens": len(scores.nll)}
        figures = {"ppl": ppl, **(comparison._asdict() if comparison else {})}
        print(json.dumps(about | counts | _plain(figures), indent=2, allow_nan=False))
        return 0
    if comparison is not None:
        print("\n".join(_lines(ppl, comparison)), end="\n\n")
    print(f"PPL = {ppl.value:.4f} +/- {ppl.error:.5f}")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}: {error.reason}; convert it first") from error


def _open(
    path: Path,
    reference: Path | None,
    text: str,
    ctx_size: int,
    limit: int | None,
    models: ModelFlags,
    device: DeviceFlags,
) -> "tuple[Evaluator, np.ndarray]":
    """What scores, and the chunks for it [C, ctx]. All that can be refused without the weights is refused first."""
    from jaxserve.evaluate import Evaluator, check_models
    from jaxserve.loading import load_model
    from jaxserve.perplexity import chunks
    from jaxserve.tokenizer import load_tokenizer

    check_models([path] if reference is None else [path, reference], ctx_size)
    tokenizer = load_tokenizer(path)
    cuts = chunks(tokenizer, text, ctx_size, limit)
    if reference is not None:
        _check_words(tokenizer, load_tokenizer(reference), set(cuts.flat))
    with reporting() as report:
        loaded = [load_model(models, device, path, report)]
        if reference is not None:
            loaded.append(load_model(replace(models, quantization=None), device, reference, report))
    return Evaluator(loaded, ctx_size), cuts


def _check_words(tokenizer: "Tokenizer", reference: "Tokenizer", ids: set[int]) -> None:
    """Raises ConfigError where an id that the text uses is another word for the reference."""
    for i in sorted(ids):
        ours, theirs = tokenizer.token_bytes(i), reference.token_bytes(i)
        if ours != theirs:
            raise ConfigError(
                f"kl_divergence: token {i} is {ours!r} for the model and {theirs!r} for the reference; "
                "give the model that was quantised as reference"
            )


def _row(count: int, ppl: "Estimate", found: "Comparison") -> str:
    """The running estimate after `count` chunks, in _COLUMNS."""
    figures = (
        _both(ppl, 4),
        _both(found.log_ratio, 5),
        _both(found.kl, 5),
        _both(found.delta_p_rms, 3, 100),
        _both(found.same_top, 3, 100),
    )
    return f"{count:5}" + "".join(f.rjust(width) for f, width in zip(figures, _COLUMNS.values(), strict=True))


def _lines(ppl: "Estimate", found: "Comparison") -> Iterator[str]:
    """The comparison, for people who know llama-perplexity's."""

    def figure(label: str, value: "Estimate | float", digits: int, scale: int = 1) -> str:
        shown = f"{scale * value:.{digits}f}" if isinstance(value, float) else _both(value, digits, scale)
        return f"  {label:<24}{shown}{' %' if scale == 100 else ''}"

    def spread(largest: float, percentiles: Mapping[float, float], smallest: float, *how: int) -> Iterator[str]:
        yield figure("maximum", largest, *how)
        for percent, value in percentiles.items():
            yield figure("median" if percent == 50 else f"{percent} %", value, *how)
        yield figure("minimum", smallest, *how)

    yield "Perplexity"
    yield figure("PPL", ppl, 6)
    yield figure("reference PPL", found.reference_ppl, 6)
    yield figure("correlation of ln(PPL)", found.correlation, 2, 100)
    yield figure("ln(PPL / reference PPL)", found.log_ratio, 6)
    yield figure("PPL / reference PPL", found.ratio, 6)
    yield figure("PPL - reference PPL", found.difference, 6)
    yield "KL divergence"
    yield figure("mean", found.kl, 6)
    yield from spread(found.kl_max, found.kl_percentiles, found.kl_min, 6)
    yield "Δp, the change in the probability of the text's own token"
    yield figure("mean", found.delta_p, 3, 100)
    yield from spread(found.delta_p_max, found.delta_p_percentiles, found.delta_p_min, 3, 100)
    yield figure("RMS", found.delta_p_rms, 3, 100)
    yield "Likeliest token"
    yield figure("the same", found.same_top, 3, 100)


def _both(estimate: "Estimate", digits: int, scale: int = 1) -> str:
    return f"{scale * estimate.value:.{digits}f} +/- {scale * estimate.error:.{digits}f}"


def _plain(value: Any) -> Any:
    """Figures for JSON: estimates by name, what is not finite as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value if math.isfinite(value) else None
