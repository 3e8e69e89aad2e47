"""What a .gguf file says of text (vocabulary, chat template, sampling), in the terms of a checkpoint directory's files.

A vocabulary there is a list of tokens with a kind and, by model, a score each or a list of merges:
- gpt2: byte-level BPE. How text is cut before merging is only named (`tokenizer.ggml.pre`): see _FAMILIES.
- gemma4: BPE over characters, spaces as U+2581, bytes for what is not in the vocabulary.
- llama: SentencePiece BPE, t5: SentencePiece unigram; both are put together again and given to that library.
- bert: WordPiece, the first piece of a word marked by U+2581 where tokenizer.json marks all the others by ##.

Where llama.cpp and the checkpoint's own tokenizer part ways (normalisation to NFC, spaces behind Phi-3's control
tokens), this follows the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.gguf import GgufFile, find_gguf
from jaxserve.tokenizer.base import BYTE_TOKEN, Settings, Tokenizer
from jaxserve.tokenizer.fast import LibraryTokenizer, byte_level
from jaxserve.tokenizer.gguf_vocabulary import KEY, Kind, Values, Vocabulary
from jaxserve.tokenizer.sentencepiece import SentencePieceTokenizer

_TEMPLATE = "tokenizer.chat_template"
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class GgufText:
    """A file's part in text, as the files of a checkpoint directory would give it."""

    tokenizer: Tokenizer
    templates: dict[str, str]
    """Chat templates by name; the main one is "default"."""
    named: dict[str, str]
    """Text of bos_token, eos_token, ..."""
    generation: dict[str, Any]
    """As generation_config.json: eos_token_id, a list, and the defaults of sampling."""


def text_gguf(path: Path) -> Path | None:
    """The .gguf file that a model path takes its text from: itself, or a directory's that has no tokenizer files.

    Raises ConfigError where a directory holds several.
    """
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return find_gguf(path)


def read_gguf(path: Path) -> GgufText:
    """Everything of text in a .gguf file. Raises as gguf_text and GgufFile do."""
    return gguf_text(GgufFile(path).metadata, str(path))


def gguf_text(metadata: Mapping[str, Any], where: str) -> GgufText:
    """Everything of text in a file's metadata; `where` names the file in errors.

    Raises ConfigError for a vocabulary that is not served, CheckpointError, naming the key, for one that is broken.
    """
    values = Values(metadata, where)
    model = values.text(KEY + "model")
    if model is None:
        raise CheckpointError(f"{where}: there is no {KEY}model: the file holds no tokenizer")
    if model not in _BUILDERS:
        raise ConfigError(f"{where}: {KEY}model {model!r} is not served; {', '.join(_BUILDERS)} are")
    vocabulary = Vocabulary(values, model)
    tokenizer = _BUILDERS[model](vocabulary)
    templates = {"default": values.text(_TEMPLATE)}
    templates |= {
        key.removeprefix(_TEMPLATE + "."): values.text(key) for key in metadata if key.startswith(_TEMPLATE + ".")
    }
    sampling = {ours: values.number(f"general.sampling.{key}") for key, ours in _SAMPLING.items()}
    return GgufText(
        tokenizer=tokenizer,
        templates={name: text for name, text in templates.items() if text},
        named=vocabulary.named,
        generation={"eos_token_id": vocabulary.ends()} | {k: v for k, v in sampling.items() if v is not None},
    )


# --- byte-level BPE

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = _CONTRACTION + _WORD + r"|\p{N}{1,3}" + _SYMBOLS + _SPACES
_QWEN2 = _CONTRACTION + _WORD + r"|\p{N}" + _SYMBOLS + _SPACES
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
# Words that begin a new piece where a capital follows a small letter.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
)
_O200K_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_O200K = _O200K_WORDS + r"|\p{N}{1,3}" + _O200K_SYMBOLS + _SPACES
_TEKKEN = _O200K_WORDS.replace(_CONTRACTION + "?", "") + r"|\p{N}" + _O200K_SYMBOLS + _SPACES
_DEEPSEEK3_WORDS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK3 = _DEEPSEEK3_WORDS + r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_OLD_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class _Family:
    """What a value of `tokenizer.ggml.pre` stands for."""

    splits: tuple[str, ...]
    """One after the other, each cuts out what it matches."""
    ignore_merges: bool = False
    """A piece that is a token is that token, whatever the merges make of it."""
    add_bos: bool = False
    """For a file that does not say."""
    nfc: bool = False


# Those that count digits from the right (superbpe, tiny_aya) are left out: a long number would take its length squared.
_BY_NAMES = {
    # Files from before the key existed.
    "default": _Family((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum": _Family((_GPT2,)),
    "mpt olmo": _Family((_GPT2,), nfc=True),
    "starcoder refact smollm codeshell exaone minerva-7b mellum2": _Family((r"\p{N}", _GPT2)),
    "command-r": _Family((r"\p{N}", _GPT2), nfc=True),
    "falcon": _Family((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": _Family(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": _Family((_LLAMA3,)),
    "glm4 glm5": _Family((_LLAMA3,), ignore_merges=True),
    "qwen2": _Family((_QWEN2,), nfc=True),
    "deepseek-r1-qwen stablelm2 hunyuan solar-open megrez kormo grok-2 f2llmv2": _Family((_QWEN2,)),
    "qwen35": _Family((_QWEN35,), nfc=True),
    "gpt-4o llama4 kanana2 minimax-m2 talkie": _Family((_O200K,)),
    "tekken": _Family((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-llm": _Family(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _OLD_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": _Family((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _OLD_CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _Family((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "poro-chat bloom gpt3-finnish": _Family((_BLOOM,)),
    "viking": _Family((_BLOOM, r"\p{N}")),
    "chameleon": _Family(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "bailingmoe bailingmoe2 llada-moe": _Family(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "seed-coder": _Family((_CONTRACTION + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES,)),
    "exaone-moe": _Family(
        (
            _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "minicpm5": _Family((r"\p{N}{1,3}", _CONTRACTION + _WORD + r"|\p{N}+" + _SYMBOLS + _SPACES), ignore_merges=True),
}
_FAMILIES = {name: family for names, family in _BY_NAMES.items() for name in names.split()}


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    pre = vocabulary.values.text(KEY + "pre") or "default"
    family = _FAMILIES.get(pre)
    if family is None:
        raise ConfigError(
            f"{vocabulary.where}: {KEY}pre {pre!r} is not served: how it cuts text is not known here; "
            f"{', '.join(sorted(_FAMILIES))} are"
        )
    model = _bpe(vocabulary, ignore_merges=family.ignore_merges)
    if family.nfc:
        model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in family.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw = vocabulary.special | set(vocabulary.words.values()) | set(vocabulary.control.values())
    table = [text.encode() if i in raw else byte_level(text) for i, text in enumerate(vocabulary.tokens)]
    add_bos = vocabulary.flag("add_bos_token", family.add_bos)
    return _library(vocabulary, model, table, add_bos=add_bos, add_eos=vocabulary.flag("add_eos_token", False))


def _bpe(vocabulary: Vocabulary, **options: Any) -> tokenizers.Tokenizer:
    """A BPE model of the `tokenizers` library."""
    key = KEY + "merges"
    merges = vocabulary.values.texts(key)
    if merges is None:
        raise CheckpointError(f"{vocabulary.where}: {key} is missing")
    ids, tokens, pairs = vocabulary.text_ids, vocabulary.tokens, []
    for i, merge in enumerate(merges):
        left, _, right = merge[1:].partition(" ")  # the left part may be a space itself
        if not merge or not right:
            raise vocabulary.values.wrong(f"{key}[{i}]", f"must be two tokens with a space between, got {merge!r}")
        left = merge[0] + left
        # The vocabulary's own strings: a large one's merges would be 16 MB of copies.
        pairs.append((tokens[ids[left]] if left in ids else left, tokens[ids[right]] if right in ids else right))
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary.text_ids, merges=pairs, **options))
    except Exception as error:  # the library raises plain Exception
        raise vocabulary.values.wrong(key, f"and {KEY}tokens do not fit: {error}") from error


def _library(
    vocabulary: Vocabulary,
    model: tokenizers.Tokenizer,
    table: list[bytes],
    *,
    add_bos: bool | None,
    add_eos: bool | None,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    strips_leading_space: bool = False,
) -> LibraryTokenizer:
    """`model` with the special tokens and words of the vocabulary. add_bos, add_eos: None leaves prefix and suffix."""

    def added(texts: Mapping[str, int], special: bool) -> list[tokenizers.AddedToken]:
        return [tokenizers.AddedToken(text, special=special, normalized=False) for text in texts]

    model.add_special_tokens(added(vocabulary.control, True))
    model.add_tokens(added(vocabulary.words, False))
    for i in vocabulary.gaps:
        table[i] = b""
    return LibraryTokenizer(
        model,
        Settings({**vocabulary.named, "add_bos_token": add_bos, "add_eos_token": add_eos}),
        table,
        text_ids=vocabulary.text_ids,
        special=vocabulary.special,
        control=vocabulary.control,
        unknown_id=vocabulary.ids.get("unknown"),
        prefix=list(prefix),
        suffix=list(suffix),
        eos=vocabulary.ids.get("eos"),
        strips_leading_space=strips_leading_space,
    )


# --- the other models


def _gemma4(vocabulary: Vocabulary) -> Tokenizer:
    unknown = vocabulary.named.get("unk_token")
    model = _bpe(vocabulary, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    model.normalizer = normalizers.Replace(" ", "▁")
    raw = vocabulary.special | set(vocabulary.control.values())
    table = [_spaced(vocabulary, i) if i not in raw else text.encode() for i, text in enumerate(vocabulary.tokens)]
    # Early files say add_bos_token false, and the model does not work without.
    return _library(vocabulary, model, table, add_bos=True, add_eos=vocabulary.flag("add_eos_token", False))


def _spaced(vocabulary: Vocabulary, i: int) -> bytes:
    """The bytes of a token in which U+2581 stands for a space."""
    text = vocabulary.tokens[i]
    if vocabulary.kinds[i] == Kind.BYTE and (byte := BYTE_TOKEN.fullmatch(text)):
        return bytes([int(byte[1], 16)])
    return text.replace("▁", " ").encode()


def _wordpiece(vocabulary: Vocabulary) -> Tokenizer:
    values = vocabulary.values
    marked = vocabulary.special | set(vocabulary.control.values())

    def piece(i: int, text: str) -> str:
        if i in marked:
            return text
        return text[1:] if text.startswith("▁") else "##" + text

    pieces = {piece(i, text): i for text, i in vocabulary.text_ids.items()}
    unknown = vocabulary.named.get("unk_token")
    if unknown is None:
        raise CheckpointError(f"{vocabulary.where}: {KEY}unknown_token_id is missing")
    lowercase = values.flag(KEY + "normalizer.lowercase")
    lowercase = True if lowercase is None else lowercase
    strip = values.flag(KEY + "normalizer.strip_accents")
    model = tokenizers.Tokenizer(models.WordPiece(vocab=pieces, unk_token=unknown, max_input_chars_per_word=100))
    model.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=lowercase if strip is None else strip
    )
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    table = [text.encode() if i in marked else _spaced(vocabulary, i) for i, text in enumerate(vocabulary.tokens)]
    cls = vocabulary.ids.get("cls", vocabulary.ids.get("bos"))
    sep = vocabulary.ids.get("seperator", vocabulary.ids.get("eos"))
    return _library(
        vocabulary,
        model,
        table,
        add_bos=vocabulary.values.flag(KEY + "add_bos_token"),
        add_eos=vocabulary.values.flag(KEY + "add_eos_token"),
        prefix=[] if cls is None else [cls],
        suffix=[] if sep is None else [sep],
        strips_leading_space=True,
    )


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """llama and t5: the model file that the vocabulary was taken from, but for what only a trainer reads."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    values, tokens = vocabulary.values, vocabulary.tokens
    unigram = values.text(KEY + "model") == "t5"
    scores = values.numbers(KEY + "scores", len(tokens))
    if scores is None:
        raise CheckpointError(f"{vocabulary.where}: {KEY}scores is missing")
    unknown = vocabulary.ids.get(
        "unknown", next((i for i, k in enumerate(vocabulary.kinds) if k == Kind.UNKNOWN), None)
    )
    # Phi-3's control tokens take the space behind them, which only tokenizer.json says.
    strips = values.text("general.architecture") == "phi3"
    added: dict[int, dict[str, Any]] = {}

    def add(i: int, content: str) -> Kind:
        added[i] = {"content": content, "special": False}
        return Kind.UNUSED

    def kind_of(i: int, text: str) -> Kind:
        kind = vocabulary.kinds[i]
        if i == unknown:
            return Kind.UNKNOWN
        if i in vocabulary.gaps:
            return add(i, "")
        if i in vocabulary.special:
            return Kind.CONTROL
        if kind == Kind.USER_DEFINED and not text.strip(" ▁"):
            return Kind.USER_DEFINED  # runs of spaces are SentencePiece's own; other words were added later
        if text in vocabulary.words or text in vocabulary.control:
            return add(i, text)
        return Kind(kind) if kind in (Kind.UNUSED, Kind.BYTE) else Kind.NORMAL

    model = proto.ModelProto()  # type: ignore[attr-defined]
    for i, (text, score) in enumerate(zip(tokens, scores.tolist(), strict=True)):
        kind = kind_of(i, text)
        if kind == Kind.USER_DEFINED and (marked := text.replace(" ", "▁")) not in vocabulary.text_ids:
            text = marked
        model.pieces.add(piece=text or f"[EMPTY{i}]", score=score, type=int(kind))
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM if unigram else proto.TrainerSpec.BPE  # type: ignore[attr-defined]
    model.trainer_spec.byte_fallback = Kind.BYTE in vocabulary.kinds
    for name in ("bos", "eos", "unk", "pad"):
        if named := vocabulary.named.get(f"{name}_token"):
            setattr(model.trainer_spec, f"{name}_piece", named)
    charsmap = values.numbers(KEY + "precompiled_charsmap", whole=True)
    normalizer = model.normalizer_spec
    normalizer.add_dummy_prefix = vocabulary.flag("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = vocabulary.flag("remove_extra_whitespaces", False)
    normalizer.escape_whitespaces = True
    normalizer.precompiled_charsmap = b"" if charsmap is None else charsmap.tobytes()
    if strips:
        for text, i in {**vocabulary.control, **vocabulary.words}.items():
            if text not in ("<unk>", "<s>", "<|endoftext|>"):
                added[i] = {"content": text, "special": i in vocabulary.special, "rstrip": True}
    settings = Settings(
        {
            **vocabulary.named,
            "add_bos_token": vocabulary.flag("add_bos_token", not unigram),
            "add_eos_token": vocabulary.flag("add_eos_token", unigram),
            "added_tokens_decoder": added,
        }
    )
    try:
        return SentencePieceTokenizer(model.SerializeToString(), settings)
    except ValueError as error:
        raise CheckpointError(f"{vocabulary.where}: the tokens are no SentencePiece vocabulary: {error}") from error


_BUILDERS = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _sentencepiece,
    "bert": _wordpiece,
    "gemma4": _gemma4,
}
