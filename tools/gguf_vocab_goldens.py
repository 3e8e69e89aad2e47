"""Tokenises llama.cpp's golden texts with the vocabularies it keeps beside them and prints which ids are equal.

python tools/gguf_vocab_goldens.py [FOLDER]

The vocabularies (models/ggml-vocab-*.gguf with .inp and .out) come from the source package of llama-cpp-python on
PyPI, which is downloaded once, not built, into FOLDER; tests/test_gguf_tokenizer.py reads them there too.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import JaxserveError
from jaxserve.gguf import GgufFile
from jaxserve.tokenizer.gguf import gguf_text

PACKAGE = "llama-cpp-python==0.3.36"
BETWEEN = "\n__ggml_vocab_test__\n"


def default_folder() -> Path:
    """JAXSERVE_GGUF_VOCABS, or a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("JAXSERVE_GGUF_VOCABS") or Path(cache, "jaxserve", "gguf-vocabs"))


def download(folder: Path) -> None:
    """The vocabularies into `folder`. pip unpacks the package to read its metadata, so this takes a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "-d", scratch, PACKAGE]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(package) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and "/llama.cpp/models/ggml-vocab-" in member.name:
                    data = archive.extractfile(member)
                    assert data is not None
                    (folder / name).write_bytes(data.read())


@dataclass(frozen=True)
class Result:
    """How one vocabulary fared; total is 0 for one without goldens."""

    name: str
    model: str
    pre: str
    equal: int
    total: int
    reason: str
    """What was wrong first; empty where nothing was."""
    seconds: float
    """To read the file and build the tokenizer."""


def compare(path: Path) -> Result:
    """One vocabulary against its goldens."""
    metadata = GgufFile(path).metadata
    model, pre = (str(metadata.get(f"tokenizer.ggml.{key}", "-")) for key in ("model", "pre"))
    equal, reason, seconds, texts = 0, "", 0.0, []
    golden = path.with_name(path.name + ".inp")
    if golden.is_file():
        # Not read_text: it would turn \r\n into \n.
        texts = golden.read_bytes().decode().split(BETWEEN)
        lines = path.with_name(path.name + ".out").read_text().splitlines()
        wanted = [[int(token) for token in line.split()] for line in lines]
        texts = texts[: len(wanted)]
    try:
        start = time.perf_counter()
        tokenizer = gguf_text(GgufFile(path).metadata, str(path)).tokenizer
        seconds = time.perf_counter() - start
        for text, ids in zip(texts, wanted if texts else [], strict=True):
            found = tokenizer.encode(text, add_special_tokens=False)
            equal += found == ids
            if found != ids and not reason:
                reason = f"{text[:40]!r}: {found[:12]} for {ids[:12]}"
    except JaxserveError as error:
        reason = error.message
    return Result(path.name, model, pre, equal, len(texts), reason, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    folder = parser.parse_args().folder
    if not list(folder.glob("ggml-vocab-*.gguf")):
        download(folder)
    print(f"{'file':34} {'model':7} {'pre':16} {'equal':>8} {'load s':>7}  first difference")
    for path in sorted(folder.glob("ggml-vocab-*.gguf")):
        r = compare(path)
        equal = f"{r.equal}/{r.total}" if r.total else "none"
        print(f"{r.name:34} {r.model:7} {r.pre:16} {equal:>8} {r.seconds:7.2f}  {r.reason}", flush=True)


if __name__ == "__main__":
    main()
