"""Text to token ids and back, for tokenizer.json, SentencePiece and GGUF files; knows no requests or engines."""

import logging
from pathlib import Path

from jaxserve.errors import ConfigError
from jaxserve.tokenizer.base import Tokenizer
from jaxserve.tokenizer.fast import FastTokenizer
from jaxserve.tokenizer.gguf import GgufText, read_gguf, text_gguf
from jaxserve.tokenizer.sentencepiece import SentencePieceTokenizer
from jaxserve.tokenizer.stream import Detokenizer, StopStrings

__all__ = [
    "Detokenizer",
    "FastTokenizer",
    "GgufText",
    "SentencePieceTokenizer",
    "StopStrings",
    "Tokenizer",
    "load_tokenizer",
    "read_gguf",
    "text_gguf",
]

_log = logging.getLogger(__name__)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a .gguf file or of a checkpoint directory: tokenizer.json, else tokenizer.model, else its .gguf.

    Raises ConfigError, naming what was looked for or what is wrong with it, and CheckpointError for a broken .gguf.
    """
    if (file := text_gguf(path)) is not None:
        return read_gguf(file).tokenizer
    fast, slow = path / "tokenizer.json", path / "tokenizer.model"
    if fast.is_file():
        try:
            return FastTokenizer(path)
        except ConfigError as error:
            if not slow.is_file():
                raise
            _log.warning("%s; tokenizer.model is used instead", error.message)
    if slow.is_file():
        return SentencePieceTokenizer.open(path)
    raise ConfigError(
        f"{path} holds neither tokenizer.json nor tokenizer.model nor a .gguf file; copy the checkpoint's tokenizer "
        "there"
    )
