"""A .gguf file's list of tokens, checked, whatever text is made of them: kinds, names, which are control tokens."""

from collections import Counter
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer.base import BYTE_TOKEN, has_control_form

KEY = "tokenizer.ggml."
# Metadata's names of the special tokens, and tokenizer_config.json's. "seperator" is the format's own spelling.
_NAMED = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
    "cls": "cls_token",
}
# Control tokens that end an answer where no key says so. A file has one eos; generation_config.json had several.
_ENDS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|return|> <|call|> <|endoftext|> <|end_of_text|> <end_of_turn> <turn|> "
    "<|tool_response> <EOT> [EOT] <end_of_utterance> <｜end▁of▁sentence｜> [e~[".split()
)


class Values:
    """Metadata whose values are checked as they are taken; None for a key that is absent."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self._metadata = metadata
        self.where = where

    def wrong(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} {what}")

    def _get(self, key: str, kind: Any, name: str) -> Any:
        value = self._metadata.get(key)
        if value is not None and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
            raise self.wrong(key, f"must be {name}, got {type(value).__name__} {str(value)[:100]}")
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self._get(key, str, "a string")
        if value is not None and not _is_unicode(value):
            raise self.wrong(key, "is not UTF-8")
        return value

    def flag(self, key: str) -> bool | None:
        value: bool | None = self._get(key, bool, "true or false")
        return value

    def number(self, key: str) -> int | float | None:
        value: int | float | None = self._get(key, int | float, "a number")
        # 0.6 is stored as a float32, which is not the double of that name.
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def token(self, key: str, size: int) -> int | None:
        """An id below `size`."""
        value: int | None = self._get(key, int, "a token id")
        if value is not None and not 0 <= value < size:
            raise self.wrong(key, f"is {value}, and there are {size} tokens")
        return value

    def texts(self, key: str) -> list[str] | None:
        value: list[str] | None = self._get(key, list, "an array of strings")
        if value is None:
            return None
        if not all(isinstance(text, str) for text in value):
            raise self.wrong(key, "must be an array of strings")
        if not _is_unicode("".join(value)):
            i = next(i for i, text in enumerate(value) if not _is_unicode(text))
            raise self.wrong(f"{key}[{i}]", f"is not UTF-8: {value[i].encode('utf-8', 'surrogateescape')!r}")
        return value

    def numbers(self, key: str, size: int | None = None, *, whole: bool = False) -> np.ndarray | None:
        """A vector without NaN; with `size`, one of that length."""
        value = self._metadata.get(key)
        if value is None or (isinstance(value, list) and not value and not size):  # an empty array has no type
            return None
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in ("iu" if whole else "iuf"):
            raise self.wrong(key, f"must be an array of {'whole ' if whole else ''}numbers")
        if size is not None and len(value) != size:
            raise self.wrong(key, f"has {len(value)} entries, {KEY}tokens has {size}")
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise self.wrong(key, "holds NaN")
        return value


class Kind(IntEnum):
    """The format's kinds of tokens; SentencePiece's, and one for none of them."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL = (Kind.CONTROL, Kind.UNKNOWN)


class Vocabulary:
    """The tokens, checked: their kinds, and which of them are named."""

    def __init__(self, values: Values, model: str):
        self.values = values
        self.where = values.where
        tokens = values.texts(KEY + "tokens")
        if not tokens:
            raise CheckpointError(f"{self.where}: {KEY}tokens is missing or empty")
        self.tokens = tokens
        size = len(tokens)
        kinds = values.numbers(KEY + "token_type", size, whole=True)
        self.ids: dict[str, int] = {}
        """By metadata's names: bos, eos, ..."""
        defaults = _DEFAULT_IDS.get(model, {})
        for name in (*_NAMED, "eot", "eom"):
            given, default = values.token(f"{KEY}{name}_token_id", size), defaults.get(name, size)
            if given is not None:
                self.ids[name] = given
            elif default < size and (kinds is None or kinds[default] in _SPECIAL):
                self.ids[name] = default
        self.kinds: list[int] = self._guessed_kinds(model) if kinds is None else kinds.tolist()
        # Names that fill a gap in the ids; a text of that name is not the token.
        self.gaps = {i for i, text in enumerate(tokens) if not text or text == f"[PAD{i}]"} - set(self.ids.values())
        self.text_ids = {text: i for i, text in enumerate(tokens) if i not in self.gaps}
        if len(self.text_ids) + len(self.gaps) != size:
            counts = Counter(text for i, text in enumerate(tokens) if i not in self.gaps)
            twice = counts.most_common(1)[0][0]
            raise values.wrong(KEY + "tokens", f"holds {twice[:100]!r} more than once")
        self.named = {
            theirs: tokens[self.ids[ours]]
            for ours, theirs in _NAMED.items()
            if ours in self.ids and tokens[self.ids[ours]]
        }
        self.special = {i for i, kind in enumerate(self.kinds) if kind in _SPECIAL} - self.gaps
        # A file may call any token its bos; one that text is made of stays a part of text.
        named = set(self.named.values())
        self.control = {
            text: i
            for text, i in self.text_ids.items()
            if i in self.special
            or text in _ENDS
            or ((self.kinds[i] == Kind.USER_DEFINED or text in named) and has_control_form(text))
        }
        self.words = {
            text: i
            for text, i in self.text_ids.items()
            if self.kinds[i] == Kind.USER_DEFINED and text not in self.control
        }
        """Parts of the vocabulary that are cut out of a text before anything else."""

    def _guessed_kinds(self, model: str) -> list[int]:
        kinds: list[int] = [Kind.NORMAL] * len(self.tokens)
        if model == "llama":
            kinds = [Kind.BYTE if BYTE_TOKEN.fullmatch(text) else Kind.NORMAL for text in self.tokens]
        for name, i in self.ids.items():
            kinds[i] = Kind.UNKNOWN if name == "unknown" else Kind.CONTROL
        return kinds

    def ends(self) -> list[int]:
        """The ids that end an answer, eos first."""
        texts = _ENDS & self.control.keys()
        if {"<|return|>", "<|call|>"} <= texts:  # there, <|end|> ends only one of an answer's messages
            texts -= {"<|end|>"}
        known = [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]
        return list(dict.fromkeys([*known, *sorted(self.control[text] for text in texts)]))

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.flag(KEY + name)
        return default if value is None else value


_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
    "bert": {"unknown": 100, "cls": 101, "seperator": 102, "padding": 0},
}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
