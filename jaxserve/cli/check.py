"""`jaxserve check`: whether a model file of somebody's own keeps the rules, and where it does not."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from jaxserve.errors import JaxserveError

_NAME = 17  # columns of a check's name


def check(file: str, *, checkpoint: str | None = None, revision: str | None = None) -> int:
    """Check a model file before it is served: shapes, cache, positions, batches, types, meshes, a checkpoint's names.

    The file is executed. What is computed is a small model of drawn weights, sized by the file's EXAMPLE, or by the
    checkpoint's config.json where it has none. The exit code is 1 if anything fails.

    Parameters
    ----------
    file
        Python file or module of the model; my_model.py:NAME takes an object of it.
    checkpoint
        Local directory, GGUF file or Hugging Face id whose tensors the model must name; only their names, shapes and
        types are read.
    revision
        Branch, tag or commit of a Hugging Face id.
    """
    from jaxserve.conformance import Finding
    from jaxserve.hub import resolve_model
    from jaxserve.model_code import load_model_code
    from jaxserve.weights import open_checkpoint

    opened = None if checkpoint is None else open_checkpoint(resolve_model(checkpoint, revision))
    try:
        model = load_model_code(file)
    except JaxserveError as error:
        failed, count = _print([Finding("file", "FAIL", error.message)])
    else:
        failed, count = _print(_findings(file, model, opened))
    print(f"{file}: " + (f"{failed} of {count} checks failed" if failed else f"all {count} checks passed"))
    return 1 if failed else 0


def _findings(file: str, model: Any, checkpoint: Any) -> Iterator[Any]:
    """Those of the model by itself, and if it computes right alone, whether it does so divided."""
    from jaxserve.conformance import check_model
    from jaxserve.conformance_mesh import check_on_meshes

    right = True
    for finding in check_model(model, model.example, checkpoint):
        right &= finding.outcome != "FAIL" and finding.check != "values"
        yield finding
    hf = model.example or (checkpoint and checkpoint.config)
    if right and hf:
        yield check_on_meshes(file, hf)


def _print(findings: Iterable) -> tuple[int, int]:
    """How many failed, and how many there were."""
    failed = count = 0
    for finding in findings:
        count += finding.outcome != "note"
        failed += finding.outcome == "FAIL"
        lead = f"{finding.outcome:<5}{finding.check:<{_NAME}} "
        wrap = textwrap.TextWrapper(110, subsequent_indent=" " * len(lead), break_long_words=False)
        for line in finding.detail.splitlines():
            wrap.initial_indent, lead = lead, wrap.subsequent_indent
            print(wrap.fill(line), flush=True)
    return failed, count
