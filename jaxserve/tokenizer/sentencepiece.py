"""tokenizer.model, through the `sentencepiece` library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.tokenizer.base import (
    BYTE_TOKEN,
    Settings,
    TableTokenizer,
    any_of,
    has_control_form,
    not_unicode,
    with_token,
)


class SentencePieceTokenizer(TableTokenizer):
    """A SentencePiece model, through the `sentencepiece` library; added tokens come from the settings."""

    @classmethod
    def open(cls, path: Path) -> "SentencePieceTokenizer":
        """tokenizer.model of a checkpoint directory. Raises ConfigError when that is not a SentencePiece model."""
        file = path / "tokenizer.model"
        try:
            return cls(file.read_bytes(), Settings.beside(path))
        except ValueError as error:
            raise ConfigError(f"{file} is not a SentencePiece model: {error}; give tokenizer.json instead") from error

    def __init__(self, data: bytes, settings: Settings):
        """`data`: a serialised ModelProto. Raises ValueError when it is not one that the library reads."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as proto

        try:
            model = proto.ModelProto.FromString(data)  # type: ignore[attr-defined]
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # DecodeError or RuntimeError, by version
            raise ValueError(str(error)) from error
        piece_type = proto.ModelProto.SentencePiece  # type: ignore[attr-defined]
        # Taken once: an attribute of protobuf's costs more than all else that is done with a piece.
        control_kind, unknown_kind, word_kind = piece_type.CONTROL, piece_type.UNKNOWN, piece_type.USER_DEFINED
        byte_kind, unused_kind = piece_type.BYTE, piece_type.UNUSED
        ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        # A piece that the model does not use may be given a use.
        size = len(model.pieces)
        added = {i: e for i, e in settings.added.items() if not 0 <= i < size or model.pieces[i].type == unused_kind}
        ids |= {entry["content"]: i for i, entry in added.items()}
        names = settings.control_names()
        special = {i for i, p in enumerate(model.pieces) if p.type in (control_kind, unknown_kind)}
        special |= {i for i, entry in added.items() if entry.get("special")}
        parsed = {p.piece: i for i, p in enumerate(model.pieces) if p.type == word_kind}
        parsed |= {entry["content"]: i for i, entry in added.items()}
        control = {p.piece: i for i, p in enumerate(model.pieces) if i in special}
        control |= {t: i for t, i in parsed.items() if i in special or t in names or has_control_form(t)}

        table = [b""] * (max(ids.values(), default=-1) + 1)
        for i, piece in enumerate(model.pieces):
            byte = piece.type == byte_kind and BYTE_TOKEN.fullmatch(piece.piece)
            plain = piece.piece if i in special else piece.piece.replace("▁", " ")
            table[i] = bytes([int(byte[1], 16)]) if byte else plain.encode()
        for i, entry in added.items():
            table[i] = entry["content"].encode()

        prefixed = model.normalizer_spec.add_dummy_prefix
        super().__init__(
            settings,
            table,
            text_ids=ids,
            special=special,
            control=control,
            unknown_id=self._model.unk_id(),
            bos=_known(self._model.bos_id()),
            eos=_known(self._model.eos_id()),
            strips_leading_space=prefixed,
        )
        add_bos, add_eos = settings.flag("add_bos_token"), settings.flag("add_eos_token")
        self._prefix = with_token([], self.bos_token_id, True if add_bos is None else add_bos)
        self._suffix = with_token([], next(iter(self.eos_token_ids), None), add_eos)
        # `legacy` (the default) gives every stretch of text between added tokens a prefix space, else only the first.
        self._bare = self._model
        if prefixed:
            model.normalizer_spec.add_dummy_prefix = False
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self._inner = self._bare if settings.flag("legacy") is False else self._model
        self._strips = {i: (bool(e.get("lstrip")), bool(e.get("rstrip"))) for i, e in settings.added.items()}
        words = {entry["content"]: i for i, entry in added.items() if entry["content"] not in control}
        self._words = words
        self._word = any_of(words)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        ids = self.encode_parts(self.split_control(text) if parse_special else [text])
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        pieces: list[str | int] = []
        for part in parts:  # the added words, which SentencePiece does not know
            if isinstance(part, int):
                pieces.append(part)
                continue
            end = 0
            for match in self._word.finditer(part):
                pieces += [part[end : match.start()], self._words[match[0]]]
                end = match.end()
            pieces.append(part[end:])
        ids: list[int] = []
        rstrip, model = False, self._model
        for k, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                rstrip, model = self._strips.get(piece, (False, False))[1], self._inner
                continue
            following = pieces[k + 1] if k + 1 < len(pieces) else None
            piece = piece.lstrip() if rstrip else piece
            if isinstance(following, int) and self._strips.get(following, (False, False))[0]:
                piece = piece.rstrip()
            if piece:
                ids += self._text(piece, model)
                model = self._bare  # text beside text: only split by the caller
        return ids

    def _text(self, text: str, model: Any) -> list[int]:
        try:
            ids = model.encode(text)
            if self._forbidden.isdisjoint(ids):
                return ids
            first, *rest = self._apart(text)
            return self._checked([*model.encode(first), *(i for t in rest for i in self._bare.encode(t))])
        except (RuntimeError, TypeError, UnicodeEncodeError) as error:
            raise not_unicode() from error


def _known(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
