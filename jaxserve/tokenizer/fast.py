"""tokenizer.json, through the `tokenizers` library."""

import functools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from jaxserve.errors import ConfigError
from jaxserve.tokenizer.base import BYTE_TOKEN, Settings, TableTokenizer, has_control_form, not_unicode, with_token

# Above this, the batch entry is used: it makes no offsets, which halves the time, and starts a thread pool.
_LONG_CHARS = 16_384
_EOS_GUESSES = ("<|im_end|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")


class LibraryTokenizer(TableTokenizer):
    """Encodes with a model of the `tokenizers` library, wherever that came from.

    The library finds the text of special tokens in any text, or, with encode_special_tokens, in none. Each control
    token therefore gets an alias, an added token whose text nobody can guess: encode_parts writes aliases where ids
    were given, the library parses those and nothing else, and everything that it does around an added token
    (lstrip, prefix space, normalisation) stays as it is.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        settings: Settings,
        table: list[bytes],
        *,
        text_ids: Mapping[str, int],
        special: set[int],
        control: Mapping[str, int],
        unknown_id: int | None,
        prefix: list[int],
        suffix: list[int],
        eos: int | None,
        strips_leading_space: bool,
    ):
        """`model` is taken over and changed; every control token is an added token of it.

        prefix, suffix: what add_special_tokens puts around a text, unless the settings say otherwise.
        """
        super().__init__(
            settings,
            table,
            text_ids=text_ids,
            special=special,
            control=control,
            unknown_id=unknown_id,
            bos=prefix[0] if prefix else None,
            eos=eos,
            strips_leading_space=strips_leading_space,
        )
        # As in transformers, an explicit setting outranks the post-processor in the file.
        self._prefix = with_token(prefix, self.bos_token_id, settings.flag("add_bos_token"))
        self._suffix = with_token(suffix, next(iter(self.eos_token_ids), None), settings.flag("add_eos_token"))

        added = model.get_added_tokens_decoder()
        flags = {i: {f: getattr(added[i], f) for f in ("lstrip", "rstrip", "single_word")} for i in control.values()}
        nonce = secrets.token_hex(16)
        self._alias = {i: f"\ue000{nonce}:{i}\ue001" for i in control.values()}
        model.encode_special_tokens = True
        model.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
        model.add_tokens(
            [tokenizers.AddedToken(a, special=False, normalized=False, **flags[i]) for i, a in self._alias.items()]
        )
        self._alias_ids = {model.token_to_id(a): i for i, a in self._alias.items()}
        self._model = model

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        ids = self.encode_parts(self.split_control(text) if parse_special else [text])
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        ids = self._library("".join(p if isinstance(p, str) else self._marked(p) for p in parts))
        if not self._forbidden.isdisjoint(ids):
            texts = [q for p in parts for q in (self._apart(p) if isinstance(p, str) else [self._marked(p)])]
            ids = [i for text in texts for i in self._checked(self._library(text))]
        return [self._alias_ids.get(i, i) for i in ids]

    def _marked(self, token_id: int) -> str:
        assert token_id in self._alias, f"{token_id} is not a control token"
        return self._alias[token_id]

    def _library(self, text: str) -> list[int]:
        try:
            if len(text) > _LONG_CHARS:
                return self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return self._model.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise not_unicode() from error


class FastTokenizer(LibraryTokenizer):
    """tokenizer.json and what lies beside it."""

    def __init__(self, path: Path):
        """Raises ConfigError when the file is broken or decodes by a rule that has no bytes."""
        file = path / "tokenizer.json"
        try:
            data = file.read_bytes()
            spec = msgspec.json.decode(data, type=_FastFile)
            model = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error
        settings = Settings.beside(path)
        model.no_truncation()
        model.no_padding()
        added = model.get_added_tokens_decoder()
        vocab = model.get_vocab(with_added_tokens=True)
        names = settings.control_names()
        control = {
            t.content: i for i, t in added.items() if t.special or t.content in names or has_control_form(t.content)
        }
        to_bytes, strips = _byte_rule(spec.decoder, file)
        table = [b""] * (max(vocab.values(), default=-1) + 1)
        for text, i in vocab.items():
            raw = i in added and (added[i].special or to_bytes is byte_level)
            table[i] = text.encode() if raw else to_bytes(text)

        prefix, suffix = _post_processed(model)
        unknown = getattr(model.model, "unk_token", None)
        super().__init__(
            model,
            settings,
            table,
            text_ids=vocab,
            special={i for i, t in added.items() if t.special},
            control=control,
            unknown_id=vocab.get(unknown) if unknown is not None else None,
            prefix=prefix,
            suffix=suffix,
            eos=next((vocab[t] for t in _EOS_GUESSES if t in control), None),
            strips_leading_space=strips,
        )


class _FastFile(msgspec.Struct):
    """The parts of tokenizer.json that are read here; the library reads the rest."""

    decoder: dict[str, Any] | None = None


def _post_processed(model: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the file's post-processor puts before and after a text."""
    bare = model.encode("a", add_special_tokens=False).ids
    full = model.encode("a", add_special_tokens=True).ids
    starts = (k for k in range(len(full)) if full[k : k + len(bare)] == bare)
    start = next(starts, 0)
    return full[:start], full[start + len(bare) :]


def _byte_rule(decoder: dict[str, Any] | None, file: Path) -> tuple[Callable[[str], bytes], bool]:
    """How a token's text becomes bytes, and whether a whole text loses one leading space."""
    if decoder is None:  # the library joins tokens by spaces
        return lambda text: b" " + text.encode(), True
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replaced: list[tuple[str, str]] = []
    by_byte = strips = False
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                return byte_level, False
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replaced.append((old, " "))
                strips = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            case {"type": "ByteFallback"}:
                by_byte = True
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                strips = start == 1
            case {"type": "Fuse"}:
                pass
            case {"type": "WordPiece", "prefix": prefix}:
                return lambda text: word_piece(text, prefix), True
            case _:
                raise ConfigError(
                    f"{file}: decoder {json.dumps(step)[:200]} is not supported; ByteLevel, Metaspace, Replace, "
                    "ByteFallback, Fuse, Strip and WordPiece are"
                )

    def rule(text: str) -> bytes:
        if by_byte and (byte := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            text = text.replace(old, new)
        return text.encode()

    return rule, strips


def word_piece(text: str, prefix: str) -> bytes:
    """The bytes of a token of WordPiece: a word has a space before it, what goes on with one begins with `prefix`."""
    return text.removeprefix(prefix).encode() if text.startswith(prefix) else b" " + text.encode()


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Byte-level BPE's printable letter for each byte: itself, or the next unused letter from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(others)}


def byte_level(text: str) -> bytes:
    """The bytes of a token of byte-level BPE."""
    letters = _byte_letters()
    try:
        return bytes([letters[c] for c in text])
    except KeyError:  # the library's rule: a token with any other letter stands for itself
        return text.encode()
