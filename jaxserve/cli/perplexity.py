"""`jaxserve perplexity`: how well a model predicts a text, and how far it is from a reference; llama.cpp's figures."""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
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
    from jaxserve.logits_file import LogitsFile
    from jaxserve.perplexity import Comparison, Estimate, Scores, Window
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
    text: Path | None = None,
    *,
    ctx_size: Annotated[int | None, Parameter(alias="-c")] = None,
    chunks: int | None = None,
    stride: int | None = None,
    kl_divergence: str | None = None,
    kl_divergence_base: Path | None = None,
    save_all_logits: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    config: cli.ConfigFile = None,
    models: Annotated[ModelFlags, Parameter(name="*", group=Group("Model", sort_key=1))] = ModelFlags(),
    device: Annotated[DeviceFlags, Parameter(name="*", group=Group("Device", sort_key=3))] = DeviceFlags(),
) -> int:
    """Measure the perplexity of a text, as llama-perplexity does, and what quantising a model has changed.

    The text is cut into chunks of --ctx-size tokens; each begins with BOS where the model wants it, and of each the
    second half is scored. With --stride a window of --ctx-size tokens slides over the text, and every token is scored
    once, as in Hugging Face's guide to perplexity. The running estimate is printed as chunks finish.

    Parameters
    ----------
    model
        GGUF file, local directory (safetensors or Orbax), or Hugging Face id; jaxserve-tiny is the embedded model.
    text
        UTF-8 text file. With --kl-divergence-base it may be left out.
    ctx_size
        Tokens of a chunk. Default: 512, or those of the file of logits.
    chunks
        Most chunks or windows to compute. Default: all.
    stride
        Tokens from one window to the next. The fewer, the more context each token has, and the longer it takes.
    kl_divergence
        A reference, named as MODEL is: the model before it was quantised. Compares both models' distributions over the
        whole vocabulary. --revision and --quantization are for MODEL only, all other options for both.
    kl_divergence_base
        The same with llama-perplexity's file of a reference's logits, which holds the tokens, too.
    save_all_logits
        Write such a file: two bytes for each word of the vocabulary and scored token.
    as_json
        Print JSON; the running estimate goes to stderr.
    config
        TOML file with any of these settings.
    """
    _check_flags(text, stride, kl_divergence, kl_divergence_base, save_all_logits)
    path = resolve_model(model, models.revision)
    reference = None if kl_divergence is None else resolve_model(kl_divergence)

    import numpy as np

    from jaxserve import perplexity as rules
    from jaxserve.logits_file import LogitsFile, LogitsWriter

    base = None if kl_divergence_base is None else LogitsFile(kl_divergence_base)
    compared_with = reference or kl_divergence_base
    size = ctx_size if ctx_size is not None else 512 if base is None else base.ctx_size
    words, saves = None if text is None else _read(text), save_all_logits is not None
    evaluator, cuts, vocab = _open(path, reference, base, words, size, chunks, stride, saves, models, device)
    out = sys.stderr if as_json else sys.stdout  # whoever reads JSON wants the result alone
    print(f"{len(cuts)} {'windows' if stride else 'chunks'} of {size} tokens", file=sys.stderr)
    if compared_with is not None:
        print("chunk" + "".join(name.rjust(width) for name, width in _COLUMNS.items()), file=out)
    running, comparison, writer = rules.Running(), None, None
    parts: list[Scores] = []  # kept for a comparison only, whose percentiles need all of them
    with ExitStack() as files:
        if save_all_logits is not None:
            writer = files.enter_context(LogitsWriter(save_all_logits, np.stack([cut.tokens for cut in cuts]), vocab))
        for done, (tokens, first) in enumerate(cuts, start=1):
            scores, rows = evaluator.score_and_keep(tokens, first, None if base is None else base.rows(done - 1))
            if writer is not None and rows is not None:
                writer.add(rows)
            running.add(scores.nll)
            ppl = running.perplexity()
            if compared_with is None:
                print(f"[{done}]{ppl.value:.4f},", end="", file=out, flush=True)
            else:
                parts.append(scores)
                comparison = rules.compare(rules.Scores.join(parts))
                print(_row(done, ppl, comparison), file=out, flush=True)
    print(file=out)
    if as_json:
        names = {"model": path, "reference": compared_with, "text": text}
        about = {key: None if value is None else str(value) for key, value in names.items()}
        counts = {"ctx_size": size, "stride": stride, "chunks": len(cuts), "scored_tokens": running.count}
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


def _check_flags(
    text: Path | None, stride: int | None, model: str | None, base: Path | None, save: Path | None
) -> None:
    if text is None and base is None:
        raise ConfigError("TEXT is missing; only with --kl-divergence-base it may be left out")
    if stride is not None and (base is not None or save is not None):
        raise ConfigError("a file of logits holds chunks, not windows; leave stride out")
    given = {"kl_divergence": model, "kl_divergence_base": base, "save_all_logits": save}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} are two runs; leave one out")


def _open(
    path: Path,
    reference: Path | None,
    base: "LogitsFile | None",
    text: str | None,
    ctx_size: int,
    limit: int | None,
    stride: int | None,
    save: bool,
    models: ModelFlags,
    device: DeviceFlags,
) -> "tuple[Evaluator, list[Window], int]":
    """What scores, the windows for it, and words of the vocabulary.

    All that can be refused without the weights is refused first.
    """
    from jaxserve.evaluate import Evaluator, check_models
    from jaxserve.loading import load_model
    from jaxserve.perplexity import Window, chunks, first_scored, windows
    from jaxserve.tokenizer import load_tokenizer

    vocab = check_models([path] if reference is None else [path, reference], ctx_size, models.model_code)
    tokenizer = load_tokenizer(path)
    if base is not None:
        cuts = [Window(c, first_scored(ctx_size)) for c in _chunks_of(base, tokenizer, text, ctx_size, vocab, limit)]
    elif stride is None:
        cuts = [Window(chunk, first_scored(ctx_size)) for chunk in chunks(tokenizer, text or "", ctx_size, limit)]
    else:
        cuts = windows(tokenizer, text or "", ctx_size, stride, limit)
    if reference is not None:
        _check_words(tokenizer, load_tokenizer(reference), set(itertools.chain(*(cut.tokens.tolist() for cut in cuts))))
    models = replace(models, max_model_len=ctx_size)
    with reporting() as report:
        loaded = [load_model(models, device, path, report)]
        if reference is not None:
            loaded.append(load_model(replace(models, quantization=None), device, reference, report))
    return Evaluator(loaded, ctx_size, base=base is not None, saves=save), cuts, vocab


def _chunks_of(
    base: "LogitsFile", tokenizer: "Tokenizer", text: str | None, ctx_size: int, vocab: int, limit: int | None
) -> "np.ndarray":
    """The file's chunks [C, ctx], or the first `limit`.

    Raises ConfigError where they are not this model's, or not the text's.
    """
    from jaxserve.perplexity import LEAST_CTX, chunks, with_bos

    if base.ctx_size < LEAST_CTX or ctx_size != base.ctx_size:
        raise ConfigError(f"{base.path} has chunks of {base.ctx_size} tokens, not {ctx_size}; leave --ctx-size out")
    if base.vocab != vocab:
        raise ConfigError(
            f"{base.path} is of a vocabulary of {base.vocab} tokens and the model has {vocab}; "
            "give logits of the model that was quantised"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"chunks must be at least 1, got {limit}")
    cuts = with_bos(tokenizer, base.tokens[:limit])
    if text is not None:
        ours = chunks(tokenizer, text, ctx_size, len(cuts))
        if ours.shape != cuts.shape or (ours != cuts).any():
            raise ConfigError(f"{base.path} is of another text, or of other words; leave TEXT out to use its tokens")
    return cuts


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
