"""What a checkpoint directory's files say of text as a GGUF file's metadata, the way back of tokenizer/gguf.py.

A byte-level vocabulary's way of cutting text is only named in GGUF, so it has to be recognised: every known name is
tried, and the one is taken with which the new metadata reads sample texts exactly as the checkpoint's own tokenizer.
A vocabulary that none reads alike is refused, rather than written to be read otherwise.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.tokenizer import load_tokenizer
from jaxserve.tokenizer.base import Settings, Tokenizer, has_control_form, read_json
from jaxserve.tokenizer.gguf import gguf_text

_KEY = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Of generation_config.json; the order is that of the keys in a file.
_SAMPLING: dict[str, tuple[str, Callable[[float], float]]] = {
    "temp": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "penalty_repeat": ("repetition_penalty", float),
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# The names of tokenizer.ggml.pre, the likely ones first. Of names that mean the same, one.
_PRE = (
    "qwen2", "llama-bpe", "tekken", "gpt-2", "smollm", "smaug-bpe", "deepseek-r1-qwen", "deepseek-llm",
    "deepseek-coder", "deepseek-v3", "gpt-4o", "qwen35", "seed-coder", "minicpm5", "command-r", "olmo", "falcon",
)  # fmt: skip

# Texts in which the known ways of cutting differ.
_SAMPLES = (
    "Hello, world! It's 2024-05-17; I'VE paid $1234567.89 for 3 x 42 items (10% off)...",
    "  two  spaces\tand a tab\n\nblank line \r\n  trailing   \n   ",
    "naïve café Zürich cafe\u0301 e\u0301te\u0301 Ångström ﬁne ½ ² Ⅷ",
    "Здравствуй, мир! Γειά σου. שלום עולם مرحبا ١٢٣ नमस्ते दुनिया १२३ ไทยภาษา",
    "你好，世界！今天是2024年。こんにちは世界ーカタカナ 안녕하세요",
    "camelCase HTTPServer snake_case x1y22z333 __init__ #include <a/b.h>\n\tfor(int i=0;i<10;++i){a[i]+=b;}//end",
    "🙂👍🏽👨‍👩‍👧 \u200b\u00a0\u3000 ~!@#$%^&*()_+`-=[]{}|;':\",./<>?",
    "https://example.org/a?b=c&d=1#e 10.0.0.1:8080 v1.2.3-rc4 (a)[b]{c} «Tiếng Việt» ąęśćż İstanbul ǅ ʼn",
    "don't DON'T we'll WE'LL o'clock 'tis a/b\n/c ...\n!!!\n",
)


def text_metadata(path: Path, vocab_size: int, templates: Mapping[str, str]) -> dict[str, Any]:
    """The keys tokenizer.* and general.sampling.* for a checkpoint directory whose embedding has `vocab_size` rows.

    `templates` are its chat templates by name, the main one under "default".
    Raises ConfigError for a vocabulary that GGUF cannot hold or that would be read otherwise from there.
    """
    tokenizer = load_tokenizer(path)
    settings = Settings.beside(path)
    vocabulary, pres = _vocabulary(path, settings, vocab_size)
    found = vocabulary | _named(path, tokenizer, settings, vocabulary[_KEY + "tokens"])
    for pre in pres:
        candidate = {_KEY + "model": found[_KEY + "model"], _KEY + "pre": pre} | found
        other = gguf_text(candidate, str(path)).tokenizer
        if all(_same(tokenizer, other, text) for text in _SAMPLES):
            return candidate | _chat_templates(templates) | _sampling(path)
    raise ConfigError(
        f"{path}: no way of cutting text that GGUF has a name for reads sample texts as this tokenizer does; "
        f"tried were {', '.join(pres)}"
    )


def _same(ours: Tokenizer, theirs: Tokenizer, text: str) -> bool:
    return ours.encode(text) == theirs.encode(text)


def _vocabulary(path: Path, settings: Settings, size: int) -> tuple[dict[str, Any], Sequence[str]]:
    """The tokens with what belongs to each, and the names that may stand for how text is cut."""
    fast, slow = path / "tokenizer.json", path / "tokenizer.model"
    spec = _tokenizer_json(fast) if fast.is_file() else {}
    added = {i: dict(entry) for i, entry in settings.added.items()}
    added |= {entry["id"]: entry for entry in spec.get("added_tokens", [])}
    if slow.is_file() and (proto := _sentencepiece_model(slow)) is not None:
        return _from_sentencepiece(proto, added, size), ("default",)
    model = spec.get("model", {})
    if model.get("type", "BPE") != "BPE" or "vocab" not in model:
        raise ConfigError(f"{path}: a vocabulary of type {model.get('type')!r} is not written as GGUF here; BPE is")
    if model.get("byte_fallback"):
        return _from_merges_with_bytes(model, added, size, load_tokenizer(path).strips_leading_space), ("default",)
    tokens, types = _table(model["vocab"], added, size)
    return {
        _KEY + "model": "gpt2",
        _KEY + "tokens": tokens,
        _KEY + "token_type": types,
        _KEY + "merges": _merges(model),
    }, _PRE


def _tokenizer_json(file: Path) -> dict[str, Any]:
    try:
        spec = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    return spec if isinstance(spec, dict) else {}


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _table(vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], size: int) -> tuple[list[str], np.ndarray]:
    """Every id's text and kind, int32 [ids]; ids without a text are filled up to `size`."""
    texts = {i: text for text, i in vocab.items()} | {i: entry["content"] for i, entry in added.items()}
    count = max(size, max(texts, default=-1) + 1)
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(count)]
    types = np.full(count, _NORMAL, np.int32)
    types[[i for i in range(count) if i not in texts]] = _UNUSED
    for i, entry in added.items():
        types[i] = _CONTROL if entry.get("special") or has_control_form(entry["content"]) else _USER_DEFINED
    return tokens, types


def _sentencepiece_model(file: Path) -> Any:
    """The parsed model; None for another kind of file of that name, as Llama 3 has."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    try:
        model = proto.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]
    except DecodeError:
        return None
    return model if model.pieces else None


def _from_sentencepiece(model: Any, added: Mapping[int, Mapping[str, Any]], size: int) -> dict[str, Any]:
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise ConfigError("a SentencePiece vocabulary that is not BPE is not written as GGUF here")
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    known = {text: i for i, (text, _, _) in enumerate(pieces)}
    # What the model knows keeps its kind and score.
    later = {i: entry for i, entry in added.items() if known.get(entry["content"]) != i}
    tokens, types = _table(known, later, size)
    scores = np.full(len(tokens), -10_000, np.float32)
    for i, (text, score, kind) in enumerate(pieces):
        if i in later:
            continue
        scores[i], types[i] = score, kind
        if kind == _USER_DEFINED:
            if added.get(i, {}).get("special") or has_control_form(text):
                types[i] = _CONTROL
            else:
                tokens[i] = text.replace("▁", " ")  # it is looked for in a text whose spaces are spaces still
    scores[list(later)] = -1_000
    found = _scored(tokens, scores, types)
    normalizer = model.normalizer_spec
    if not normalizer.add_dummy_prefix:
        found[_KEY + "add_space_prefix"] = False
    if normalizer.remove_extra_whitespaces:
        found[_KEY + "remove_extra_whitespaces"] = True
    if normalizer.precompiled_charsmap:
        found[_KEY + "precompiled_charsmap"] = np.frombuffer(normalizer.precompiled_charsmap, np.uint8)
    return found


def _from_merges_with_bytes(
    model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], size: int, prefixed: bool
) -> dict[str, Any]:
    """A SentencePiece vocabulary of which only tokenizer.json is left: a token's score is the place of its merge."""
    vocab = model["vocab"]
    tokens, types = _table(vocab, added, size)
    places: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        # Tokens hold no spaces, they have U+2581.
        places.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), place)
    scores = np.array([-float(places.get(text, len(places))) for text in tokens], np.float32)
    for byte in range(256):
        if (i := vocab.get(f"<0x{byte:02X}>")) is not None:
            types[i], scores[i] = _BYTE, 0
    if (unknown := vocab.get(model.get("unk_token"))) is not None:
        types[unknown], scores[unknown] = _UNKNOWN, 0
    found = _scored(tokens, scores, types)
    if not prefixed:
        found[_KEY + "add_space_prefix"] = False
    return found


def _scored(tokens: list[str], scores: np.ndarray, types: np.ndarray) -> dict[str, Any]:
    return {
        _KEY + "model": "llama",
        _KEY + "tokens": tokens,
        _KEY + "scores": scores,
        _KEY + "token_type": types,
    }


def _named(path: Path, tokenizer: Tokenizer, settings: Settings, tokens: Sequence[str]) -> dict[str, Any]:
    """The ids of the special tokens, and which of them a text gets."""
    config, generation = read_json(path / "config.json"), read_json(path / "generation_config.json")

    def configured(name: str) -> list[int]:
        value = generation.get(f"{name}_token_id", config.get(f"{name}_token_id"))
        ids = value if isinstance(value, list) else [value]
        return [i for i in ids if type(i) is int and 0 <= i < len(tokens)]

    def by_text(name: str) -> list[int]:
        return [tokens.index(text) for text in settings.named[name] if text in tokens]

    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else configured("bos")
    eos = [*tokenizer.eos_token_ids, *configured("eos")]
    found = {"bos": bos, "eos": eos, "unknown": by_text("unk_token"), "padding": by_text("pad_token")}
    ids = {f"{_KEY}{name}_token_id": known[0] for name, known in found.items() if known}
    # The format has one eos; others end an answer under the names of an end of turn and of a message.
    others = [i for i in dict.fromkeys(eos) if i not in (*eos[:1], *bos[:1])]
    ids |= {f"{_KEY}{name}_token_id": i for name, i in zip(("eot", "eom"), others, strict=False)}
    bare, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    return ids | {
        _KEY + "add_bos_token": bool(bos) and full[:1] == bos[:1] != bare[:1],
        _KEY + "add_eos_token": bool(eos) and full[-1:] == eos[:1] != bare[-1:],
    }


def _chat_templates(templates: Mapping[str, str]) -> dict[str, Any]:
    others = {name: text for name, text in templates.items() if name != "default"}
    found: dict[str, Any] = {_TEMPLATE: templates["default"]} if "default" in templates else {}
    if others:
        found["tokenizer.chat_templates"] = list(others)
        found |= {f"{_TEMPLATE}.{name}": text for name, text in others.items()}
    return found


def _sampling(path: Path) -> dict[str, Any]:
    generation = read_json(path / "generation_config.json")
    return {
        f"general.sampling.{key}": kind(generation[name])
        for key, (name, kind) in _SAMPLING.items()
        if type(generation.get(name)) in (int, float)
    }
