"""`jaxserve convert`: any checkpoint that can be served, written as an Orbax checkpoint."""

import sys
import time
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxserve.hub import resolve_model


def convert(
    src: str,
    dst: Path,
    *,
    revision: str | None = None,
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
) -> int:
    """Write a checkpoint as an Orbax checkpoint, with its tokenizer and chat template.

    Parameters
    ----------
    src
        Local directory (safetensors or Orbax) or Hugging Face id.
    dst
        Directory to make; it must not exist.
    revision
        Branch, tag or commit of a Hugging Face id.
    dtype
        What the weights are cast to.
    """
    import ml_dtypes
    import numpy as np

    from jaxserve.weights.convert import convert as convert_checkpoint

    dtypes = {"keep": None, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    path = resolve_model(src, revision)
    begun = time.monotonic()
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing", total=None)

        def progress(written: int, total: int) -> None:
            bar.update(task, completed=written, total=total)

        convert_checkpoint(path, dst, dtype=dtypes[dtype], progress=progress)
    print(f"wrote {dst} in {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return 0
