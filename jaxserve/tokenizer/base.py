"""What every tokenizer is, and all of it but encoding; knows no file format of a vocabulary.

Three sets of ids are kept apart:
- special: left out of decoded text. What the tokenizer file marks `special`, and its bos and eos.
- control: written by a chat template or a careful caller, never by text. The special ids, and added tokens of a
  control token's form (`<|user|>`, `<start_of_turn>`), which some checkpoints do not mark. An added token like
  `<think>` is neither: it is a word of the vocabulary that text may hold, as for transformers and vLLM.
- unknown: what a vocabulary without byte tokens falls back to.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from jaxserve.errors import ConfigError, InvalidParameter

_CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>|</?(s|bos|eos|pad|unk|start_of_turn|end_of_turn|turn)>|\[/?[A-Z_]+\]")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "additional_special_tokens")

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token that stands for one byte."""


class Tokenizer(Protocol):
    """Text to token ids and back. Immutable once loaded, so any thread may call it; encode releases the GIL."""

    vocab_size: int
    """One more than the highest id the tokenizer knows; the model's vocabulary may be padded beyond it."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_ids: frozenset[int]
    control_tokens: Mapping[str, int]
    """Text and id of every token that text can not stand for."""
    strips_leading_space: bool
    """A whole text loses one leading space when decoded, because encode put it there (SentencePiece)."""

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`.

        add_special_tokens puts bos (and eos) where the checkpoint's configuration asks for them. parse_special
        turns the text of a control token into its id; without it, it becomes ordinary tokens.
        Raises InvalidParameter for text that is not valid Unicode.
        """
        ...

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """The ids of one text in which the control tokens are given as ids and everything else is plain text."""
        ...

    def split_control(self, text: str) -> list[str | int]:
        """`text` cut at its control tokens: what encode_parts takes. Joined again, it is the text."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. A byte sequence that is not UTF-8 becomes U+FFFD, as bytes.decode replaces it."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; b"" for an id that stands for none. Special tokens: their text."""
        ...

    def token_str(self, token_id: int) -> str:
        """token_bytes as text; U+FFFD where the token is a part of a character."""
        ...


class Settings:
    """What is said of a vocabulary beside it, in the terms of tokenizer_config.json."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        special_map: Mapping[str, Any] | None = None,
        added: Mapping[str, int] | None = None,
    ):
        """special_map, added: what special_tokens_map.json and added_tokens.json hold."""
        self.config = dict(config)
        other = special_map or {}
        self.named = {name: _contents(self.config.get(name)) or _contents(other.get(name)) for name in _NAMED}
        self.added: dict[int, dict[str, Any]] = {
            int(i): {"content": text, "special": False} for text, i in (added or {}).items()
        }
        self.added |= {int(i): entry for i, entry in self.config.get("added_tokens_decoder", {}).items()}

    @classmethod
    def beside(cls, path: Path) -> "Settings":
        """The settings in a checkpoint directory. Raises ConfigError for a file that is no JSON object."""
        return cls(
            read_json(path / "tokenizer_config.json"),
            special_map=read_json(path / "special_tokens_map.json"),
            added=read_json(path / "added_tokens.json"),
        )

    def control_names(self) -> set[str]:
        """The texts that the configuration calls special."""
        return {text for texts in self.named.values() for text in texts}

    def flag(self, name: str) -> bool | None:
        value = self.config.get(name)
        return value if isinstance(value, bool) else None


class TableTokenizer:
    """Everything but encoding, from a table of each id's bytes."""

    def __init__(
        self,
        settings: Settings,
        table: list[bytes],
        *,
        text_ids: Mapping[str, int],
        special: set[int],
        control: Mapping[str, int],
        unknown_id: int | None,
        bos: int | None,
        eos: int | None,
        strips_leading_space: bool,
    ):
        """`text_ids`: id of a token's text. bos, eos: the tokenizer file's own, which the configuration overrides."""

        def named(name: str) -> int | None:
            return next((text_ids[t] for t in settings.named[name] if t in text_ids), None)

        self._table = table
        self.control_tokens: Mapping[str, int] = dict(control)
        self.vocab_size = len(table)
        configured_bos, configured_eos = named("bos_token"), named("eos_token")
        self.bos_token_id = bos if configured_bos is None else configured_bos
        eos = eos if configured_eos is None else configured_eos
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.special_ids = frozenset(special | {i for i in (self.bos_token_id, eos) if i is not None})
        self.strips_leading_space = strips_leading_space
        self._forbidden = frozenset(self.control_tokens.values()) - {unknown_id}
        self._control = any_of(self.control_tokens)

    def split_control(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        end = 0
        for match in self._control.finditer(text):
            if match.start() > end:
                parts.append(text[end : match.start()])
            parts.append(self.control_tokens[match[0]])
            end = match.end()
        if end < len(text):
            parts.append(text[end:])
        return parts

    def _apart(self, text: str) -> list[str]:
        """`text` cut inside each control token's text, for models whose own vocabulary would find them."""
        pieces, end = [], 0
        for match in self._control.finditer(text):
            pieces.append(text[end : match.start() + 1])
            end = match.start() + 1
        return [p for p in (*pieces, text[end:]) if p]

    def _checked(self, ids: list[int]) -> list[int]:
        if not self._forbidden.isdisjoint(ids):
            raise InvalidParameter("the text holds a character that the tokenizer reads as a control token")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text = join_bytes(self, ids, skip_special_tokens).decode("utf-8", "replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        return self._table[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_str(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")


def join_bytes(tokenizer: Tokenizer | TableTokenizer, ids: Sequence[int], skip_special_tokens: bool) -> bytes:
    skipped = tokenizer.special_ids if skip_special_tokens else ()
    return b"".join([tokenizer.token_bytes(i) for i in ids if i not in skipped])


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of `texts` at a place.

    Beginnings are shared, so that a place costs no more for a thousand texts than for one: `re` holds the GIL.
    """
    root: dict[str, Any] = {}
    for text in filter(None, texts):
        node = root
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        branches = [re.escape(letter) + pattern(below) for letter, below in node.items() if letter]
        if not branches:
            return ""
        if len(branches) == 1 and "" not in node:
            return branches[0]
        return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")

    return re.compile(pattern(root) or r"(?!)")


def has_control_form(text: str) -> bool:
    return _CONTROL_FORM.fullmatch(text) is not None


def with_token(ids: list[int], token_id: int | None, wanted: bool | None) -> list[int]:
    """`ids` with or without the token, as is wanted; None leaves them."""
    if wanted is None or token_id is None or wanted == (token_id in ids):
        return ids
    return [token_id, *ids] if wanted else [i for i in ids if i != token_id]


def not_unicode() -> InvalidParameter:
    return InvalidParameter(
        "the text is not valid Unicode: it holds half of a surrogate pair, which no UTF-8 text can; send the whole "
        "character, or U+FFFD in its place",
        param="prompt",
    )


def _contents(value: Any) -> list[str]:
    """The texts of an entry that is a string, an AddedToken, or a list of these."""
    entries = value if isinstance(value, list) else [value]
    texts = (e.get("content") if isinstance(e, dict) else e for e in entries)
    return [t for t in texts if isinstance(t, str) and t]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is absent. Raises ConfigError."""
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not a JSON object: {error}") from error
