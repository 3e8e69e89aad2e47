"""Text of .gguf files: the same ids as the checkpoint's own tokenizer, templates, ends, defaults, and broken files."""

import gzip
import json
import random
import runpy
import time
import unicodedata
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import sentencepiece
import tokenizers
from fake_engine import FakeEngine
from sentencepiece import sentencepiece_model_pb2

from jaxserve.errors import CheckpointError, ConfigError, InvalidParameter, JaxserveError, UnsupportedParameter
from jaxserve.gguf import GgufFile
from jaxserve.text import TextModel
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from jaxserve.tokenizer.gguf import _FAMILIES, gguf_text

TOOL = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "gguf_vocab_goldens.py"))
FOLDER: Path = TOOL["default_folder"]()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SAMPLES = [
    "",
    " ",
    "Once upon a time",
    "  two spaces, a tab\t and\n\nlines ",
    "naïve 你好 🤦🏽‍♂️ שלום 1234567 it's I'LL camelCase",
    "x </s> <s> y<unk>",
    "e\u0301\ufeff \u00a0",
]
LETTERS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def byte_level(**changes: Any) -> dict[str, Any]:
    """256 bytes, "lo", "hel", "hello", "he", two control tokens, a word, a word that looks like one, and a gap."""
    extra = ["lo", "he", "hel", "hello", "<s>", "<|im_end|>", "<think>", "<|user|>", "[PAD264]"]
    kinds = [NORMAL] * 260 + [CONTROL] * 2 + [USER_DEFINED] * 3
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": LETTERS + extra,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": ["l o", "h e", "he l", "hel lo"],
        "tokenizer.ggml.bos_token_id": 260,
        "tokenizer.ggml.eos_token_id": 261,
    }
    return {k: v for k, v in (metadata | changed(changes)).items() if v is not None}


def sentences(model: str = "llama", **changes: Any) -> dict[str, Any]:
    """SentencePiece pieces with scores: BPE, or with model="t5" unigram."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += ["▁", "a", "b", "ab", "▁ab", "abab", "  ", "<word>", "<|user|>", "[PAD268]"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 6, *[USER_DEFINED] * 4]
    metadata = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array([0] * 259 + [-1, -2, -3, -4, -5, -6, -7, -8, -9, -10], np.float32),
    }
    return {k: v for k, v in (metadata | changed(changes)).items() if v is not None}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    return {name if "." in name else f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def build(metadata: dict[str, Any]) -> Tokenizer:
    return gguf_text(metadata, "here.gguf").tokenizer


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """A .gguf file without tensors."""

    def entry(key: str, value: Any) -> bytes:
        match value:
            case bool():
                return gguf_files.entry(key, gguf_files.BOOL, value)
            case int():
                return gguf_files.entry(key, gguf_files.I32, value)
            case float():
                return gguf_files.entry(key, gguf_files.F32, value)
            case str():
                return gguf_files.entry(key, gguf_files.STRING, value)
            case np.ndarray():
                kind = gguf_files.F32 if value.dtype.kind == "f" else gguf_files.I32
                return gguf_files.entry(key, gguf_files.ARRAY, (kind, value.tolist()))
        return gguf_files.entry(key, gguf_files.ARRAY, (gguf_files.STRING, value))

    path.write_bytes(gguf_files.file_bytes([entry(k, v) for k, v in metadata.items()]))
    return path


def of_json(file: Path, model: str, pre: str, **changes: Any) -> dict[str, Any]:
    """What a converter makes of a tokenizer.json."""
    packed = file.with_name(file.name + ".gz")
    spec = json.loads(gzip.decompress(packed.read_bytes()) if packed.is_file() else file.read_bytes())
    ids = {text: i for text, i in spec["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    ids |= {entry["content"]: i for i, entry in added.items()}
    by_id = {i: text for text, i in ids.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(max(by_id) + 1)]

    def kind(i: int, text: str) -> int:
        if i in added:
            return CONTROL if added[i]["special"] else USER_DEFINED
        if i not in by_id:
            return UNUSED
        return BYTE if model == "llama" and len(text) == 6 and text.startswith("<0x") else NORMAL

    kinds = [kind(i, text) for i, text in enumerate(tokens)]
    if model == "llama":
        kinds[0] = UNKNOWN
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": merges,
    }
    if model == "llama":  # scores as good as any that give the same order
        rank = {merge.replace(" ", "", 1): -float(r) for r, merge in reversed(list(enumerate(merges, 1)))}
        metadata["tokenizer.ggml.scores"] = np.array([rank.get(t, -1e6) for t in tokens], np.float32)
    return metadata | changed(changes)


# --- against llama.cpp's goldens, and against the checkpoints' own files


def vocabularies() -> list[Path]:
    return sorted(FOLDER.glob("ggml-vocab-*.gguf"))


def test_llama_cpp_goldens():
    files = [file for file in vocabularies() if file.with_name(file.name + ".inp").is_file()]
    if not files:
        pytest.skip(
            f"no vocabularies in {FOLDER}: python tools/gguf_vocab_goldens.py fetches them, "
            "JAXSERVE_GGUF_VOCABS names their folder"
        )
    assert len(files) > 10
    for file in files:
        tokenizer = load_tokenizer(file)
        texts = file.with_name(file.name + ".inp").read_bytes().decode().split(TOOL["BETWEEN"])
        lines = file.with_name(file.name + ".out").read_text().splitlines()
        assert len(lines) >= 46
        nfc = GgufFile(file).metadata.get("tokenizer.ggml.pre") in ("qwen2", "qwen35", "command-r", "mpt")
        for text, line in zip(texts, lines, strict=False):
            wanted = [int(token) for token in line.split()]
            # llama.cpp normalises nothing; these checkpoints' own tokenizers do.
            if nfc and not unicodedata.is_normalized("NFC", text):
                wanted = plain(tokenizer, unicodedata.normalize("NFC", text))
            assert plain(tokenizer, text) == wanted, (file.name, text)


def test_vocabularies_without_goldens_open():
    files = [file for file in vocabularies() if not file.with_name(file.name + ".inp").is_file()]
    if not files:
        pytest.skip(f"no vocabularies in {FOLDER}: python tools/gguf_vocab_goldens.py fetches them")
    for file in files:
        tokenizer = load_tokenizer(file)
        ids = plain(tokenizer, "Hello, world 123")
        assert tokenizer.decode(ids).strip() == "Hello, world 123"


@pytest.mark.parametrize("name", ["babyllama361", "stories260K"])
def test_same_ids_as_the_directory(name, shared_data):
    folder = shared_data / "models" / name
    files = sorted(folder.glob("*.gguf"))
    assert files
    naughty = json.loads((shared_data / "api/blns.json").read_text())
    own = load_tokenizer(folder)
    for file in files:
        tokenizer = load_tokenizer(file)
        assert tokenizer.vocab_size == own.vocab_size
        assert tokenizer.bos_token_id == own.bos_token_id and tokenizer.eos_token_ids == own.eos_token_ids
        assert tokenizer.special_ids == own.special_ids and tokenizer.control_tokens == own.control_tokens
        for text in SAMPLES + naughty[:: 1 if file == files[0] else 20]:
            for parse in (False, True):
                ids = own.encode(text, parse_special=parse)
                assert tokenizer.encode(text, parse_special=parse) == ids
            assert tokenizer.decode(ids) == own.decode(ids)
        assert [tokenizer.token_bytes(i) for i in range(own.vocab_size)] == [
            own.token_bytes(i) for i in range(own.vocab_size)
        ]
        for golden in (folder / "golden.json", file.with_name(file.name + ".golden.json")):
            cases = json.loads(golden.read_text())["cases"]
            assert cases
            assert [tokenizer.encode(case["prompt"]) for case in cases] == [case["prompt_ids"] for case in cases]


@pytest.mark.parametrize(
    ("file", "model", "pre", "more"),
    [
        ("qwen3/tokenizer.json", "gpt2", "qwen2", {}),
        ("deepseek/tokenizer.json", "gpt2", "deepseek-v3", {}),
        ("granite/tokenizer.json", "gpt2", "refact", {}),
        ("phi/phi-3-mini_tokenizer.json", "llama", "default", {"general.architecture": "phi3"}),
    ],
)
def test_same_ids_as_tokenizer_json(file, model, pre, more, shared_data):
    source = shared_data / "tokenizers" / file
    tokenizer = build(of_json(source, model, pre, **more))
    packed = source.with_name(source.name + ".gz")
    own = tokenizers.Tokenizer.from_buffer(
        gzip.decompress(packed.read_bytes()) if packed.is_file() else source.read_bytes()
    )
    naughty = json.loads((shared_data / "api/blns.json").read_text())
    control = list(tokenizer.control_tokens)[:20]
    marked = [f"{a}{t}{b}{t}end" for t in control for a, b in (("", " x"), ("a ", "\n"), (" ", "  b"))]
    for text in SAMPLES + naughty + marked:
        wanted = own.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=True) == wanted, text


def test_same_ids_as_tokenizer_model(shared_data):
    source = shared_data / "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3"
    own = sentencepiece.SentencePieceProcessor(model_file=str(source))
    proto = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    tokenizer = build(
        sentences(
            tokens=[p.piece for p in proto.pieces],
            token_type=np.array([p.type for p in proto.pieces]),
            scores=np.array([p.score for p in proto.pieces]),
        )
    )
    for text in SAMPLES + json.loads((shared_data / "api/blns.json").read_text()):
        if tokenizer.split_control(text) in ([], [text]):
            assert plain(tokenizer, text) == own.encode(text)
            assert tokenizer.decode(plain(tokenizer, text)) == text


# --- small vocabularies


def test_byte_level():
    tokenizer = build(byte_level())
    letter = {text: i for i, text in enumerate(LETTERS)}
    assert plain(tokenizer, "hello") == [259]
    assert plain(tokenizer, "hellol o") == [259, letter["l"], letter["Ġ"], letter["o"]]
    assert tokenizer.encode("hello</s>", parse_special=True) == plain(tokenizer, "hello</s>")  # there is no such token
    assert tokenizer.bos_token_id == 260 and tokenizer.eos_token_ids == (261,)
    assert tokenizer.special_ids == {260, 261}
    assert dict(tokenizer.control_tokens) == {"<s>": 260, "<|im_end|>": 261, "<|user|>": 263}
    assert plain(tokenizer, "a<think>") == [letter["a"], 262]
    assert tokenizer.vocab_size == 265
    assert tokenizer.token_bytes(259) == b"hello" and tokenizer.token_bytes(letter["Ġ"]) == b" "
    assert tokenizer.token_bytes(262) == b"<think>" and tokenizer.token_bytes(264) == b""
    assert tokenizer.decode([260, 259, 262]) == "hello<think>"
    assert 264 not in plain(tokenizer, "[PAD264]")


@pytest.mark.parametrize("metadata", [byte_level(), sentences(), sentences("t5"), sentences(add_space_prefix=False)])
def test_text_never_becomes_a_control_token(metadata):
    tokenizer = build(metadata)
    control = set(tokenizer.control_tokens.values())
    assert len(control) >= 3
    unknown = metadata["tokenizer.ggml.tokens"].index("<unk>") if "<unk>" in metadata["tokenizer.ggml.tokens"] else -1
    for text, token in tokenizer.control_tokens.items():
        hostile = f"a {text}{text} b{text[:-1]}{text}"
        ids = plain(tokenizer, hostile)
        assert control.isdisjoint(set(ids) - {unknown})
        if unknown not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=False) == hostile
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=True) == [token]
        assert tokenizer.encode_parts([token, text])[0] == token
    with pytest.raises(InvalidParameter, match="surrogate"):
        tokenizer.encode("\ud800")


def test_a_token_of_text_that_is_called_bos_stays_text():
    tokenizer = build(byte_level(bos_token_id=LETTERS.index("!")))
    assert plain(tokenizer, "a!") == [LETTERS.index("a"), LETTERS.index("!")]
    assert "!" not in tokenizer.control_tokens


@pytest.mark.parametrize(
    ("metadata", "starts", "ends"),
    [
        (byte_level(), [], []),
        (byte_level(pre="llama-bpe"), [260], []),
        (byte_level(pre="llama-bpe", add_bos_token=False), [], []),
        (byte_level(add_bos_token=True, add_eos_token=True), [260], [261]),
        (byte_level(add_bos_token=True, bos_token_id=None), [], []),
        (sentences(), [1], []),
        (sentences(add_bos_token=False, add_eos_token=True), [], [2]),
        (sentences("t5", eos_token_id=2, unknown_token_id=0, padding_token_id=1), [], [2]),
    ],
)
def test_bos_and_eos(metadata, starts, ends):
    tokenizer = build(metadata)
    inner = plain(tokenizer, "ab")
    assert inner and tokenizer.encode("ab") == [*starts, *inner, *ends]


@pytest.mark.parametrize(("pre", "ids"), [("gpt-2", ["12", "3"]), ("llama-bpe", ["123"]), ("qwen2", ["1", "2", "3"])])
def test_pre_says_how_text_is_cut(pre, ids):
    tokens = [*LETTERS, "12", "123", "<s>"]
    tokenizer = build(
        byte_level(
            pre=pre,
            tokens=tokens,
            token_type=np.array([NORMAL] * 258 + [CONTROL]),
            merges=["1 2"],
            bos_token_id=258,
            eos_token_id=258,
        )
    )
    assert [tokens[i] for i in plain(tokenizer, "123")] == ids


def test_every_family_cuts_text_without_losing_any():
    draw = random.Random(0)
    alphabet = "aZéß你ㄅ가ก \t\n\r\u00a0\u3000.!'\"…，123٣½😀\u0301-_$+`\x00"
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(60)] + SAMPLES
    for pre, family in _FAMILIES.items():
        tokenizer = build(byte_level(pre=pre))
        for text in texts:
            wanted = unicodedata.normalize("NFC", text) if family.nfc else text
            assert tokenizer.decode(plain(tokenizer, text), skip_special_tokens=False) == wanted, pre


def test_composed_characters_are_the_checkpoints():
    assert plain(build(byte_level(pre="qwen2")), "e\u0301") == plain(build(byte_level()), "é")
    assert plain(build(byte_level()), "e\u0301") != plain(build(byte_level()), "é")


def test_sentencepiece_bpe():
    tokenizer = build(sentences())
    ids = {text: i for i, text in enumerate(sentences()["tokenizer.ggml.tokens"])}
    assert plain(tokenizer, "ab") == [ids["▁ab"]]
    assert plain(tokenizer, "abab") == [ids["▁ab"], ids["ab"]]
    assert plain(tokenizer, "ab\n") == [ids["▁ab"], ids["<0x0A>"]]
    assert plain(tokenizer, "a<word>ab") == [ids["▁"], ids["a"], ids["<word>"], ids["▁ab"]]
    assert tokenizer.decode(plain(tokenizer, "ab\n<word>")) == "ab\n<word>"
    assert tokenizer.encode("<|user|>ab", parse_special=True) == [1, ids["<|user|>"], ids["▁ab"]]
    assert 268 not in plain(tokenizer, "[PAD268]") and tokenizer.token_bytes(268) == b""
    assert tokenizer.strips_leading_space
    bare = build(sentences(add_space_prefix=False))
    assert plain(bare, "ab") == [ids["ab"]] and plain(bare, "a  b") == [ids["a"], ids["  "], ids["b"]]
    assert not bare.strips_leading_space and bare.token_bytes(ids["  "]) == b"  "


def test_phi3_takes_the_space_behind_a_control_token():
    metadata = sentences(**{"general.architecture": "phi3"})
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    assert build(metadata).encode("<|user|>\nab", parse_special=True) == [1, ids["<|user|>"], ids["▁ab"]]


def test_unigram():
    tokenizer = build(sentences("t5", unknown_token_id=0, eos_token_id=2))
    ids = {text: i for i, text in enumerate(sentences()["tokenizer.ggml.tokens"])}
    assert plain(tokenizer, "ab") == [ids["▁ab"]]
    assert plain(tokenizer, "abab ab") == [ids["▁"], ids["abab"], ids["▁ab"]]  # -7 beats -9
    spaces = build(sentences("t5", unknown_token_id=0, remove_extra_whitespaces=True))
    assert plain(spaces, " ab   ab ") == [ids["▁ab"], ids["▁ab"]]


def test_wordpiece():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁hel", "lo", "▁,", "▁world"]
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([CONTROL] * 4 + [NORMAL] * 4),
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
    }
    tokenizer = build(metadata)
    assert tokenizer.encode("Hello, world x") == [2, 4, 5, 6, 7, 1, 3]
    assert tokenizer.decode([2, 4, 5, 7]) == "hello world"
    cased = build(metadata | {"tokenizer.ggml.normalizer.lowercase": False})
    assert plain(cased, "Hello") == [1]


def test_gemma4():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "<turn|>"]
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([CONTROL] * 3 + [UNKNOWN] + [BYTE] * 256 + [NORMAL] * 4 + [CONTROL]),
        "tokenizer.ggml.merges": ["▁ a"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
    }
    text = gguf_text(metadata, "here.gguf")
    assert [tokens[i] for i in text.tokenizer.encode("b a\n")] == ["<bos>", "b", "▁a", "<0x0A>"]
    assert text.tokenizer.decode(text.tokenizer.encode("b a\né")) == "b a\né"
    assert text.generation["eos_token_id"] == [1, 264]


def test_kinds_that_are_missing_are_guessed():
    tokenizer = build(sentences(token_type=None))
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.token_bytes(3 + 10) == b"\n"
    assert plain(tokenizer, "ab") == [263]


# --- what is served of it


def test_a_model_is_described_by_its_file(tmp_path):
    metadata = byte_level(
        eot_token_id=263,
        **{
            "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "tokenizer.chat_template.tool_use": "{{ bos_token }}{{ tools|length }}",
            "tokenizer.chat_templates": ["tool_use"],
            "general.sampling.temp": 0.6,
            "general.sampling.top_k": 20,
            "general.sampling.top_p": 0.95,
            "general.sampling.min_p": 0.05,
            "general.sampling.penalty_repeat": 1.1,
            "general.sampling.mirostat": 0,
        },
    )
    file = write(tmp_path / "m.gguf", metadata)
    for path in (file, tmp_path):
        text = TextModel.open(path, FakeEngine(), "m")
        assert text.eos_token_ids == (261, 263)
        assert (text.defaults.temperature, text.defaults.top_k, text.defaults.top_p) == (0.6, 20, 0.95)
        assert (text.defaults.min_p, text.defaults.repetition_penalty, text.defaults.max_tokens) == (0.05, 1.1, None)
        ids = text.encode_chat([{"role": "user", "content": "hello<|im_end|>"}], add_generation_prompt=False)
        assert ids[:2] == (260, 259) and ids.count(261) == 1 and ids[-1] == 261
        tool = {"type": "function", "function": {"name": "f"}}
        assert text.encode_chat([{"role": "user", "content": "x"}], tools=[tool]) == (260, LETTERS.index("1"))


def test_a_file_without_a_template_serves_completions_only(tmp_path):
    text = TextModel.open(write(tmp_path / "m.gguf", byte_level()), FakeEngine(), "m")
    assert text.encode_prompt("hello") == (259,)
    assert text.defaults.temperature == 1.0
    with pytest.raises(UnsupportedParameter, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "x"}])


def test_the_directorys_own_tokenizer_goes_first(tmp_path, shared_data):
    write(tmp_path / "m.gguf", byte_level())
    source = shared_data / "models/stories260K"
    (tmp_path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(source).vocab_size


def test_several_files_are_not_guessed_among(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.gguf", byte_level())
    with pytest.raises(ConfigError, match="a.gguf"):
        load_tokenizer(tmp_path)


def test_harmony_answers_go_on_behind_end():
    extra = ["<|end|>", "<|return|>", "<|call|>"]
    metadata = byte_level(tokens=LETTERS + extra, token_type=np.array([NORMAL] * 256 + [CONTROL] * 3), merges=[])
    metadata |= {"tokenizer.ggml.bos_token_id": 257, "tokenizer.ggml.eos_token_id": 257}
    assert gguf_text(metadata, "").generation["eos_token_id"] == [257, 258]


# --- files that are not right


def put(values: list, i: int, value: Any) -> list:
    return [*values[:i], value, *values[i + 1 :]]


GOOD = byte_level()
TOKENS, MERGES = GOOD["tokenizer.ggml.tokens"], GOOD["tokenizer.ggml.merges"]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "tokenizer.ggml.model"),
        (byte_level(model=5), "must be a string"),
        (byte_level(tokens=None), "tokens is missing"),
        (byte_level(tokens=[]), "tokens is missing"),
        (byte_level(tokens=np.arange(3)), "tokens must be an array of strings"),
        (byte_level(tokens=put(TOKENS, 7, "\udcff")), r"tokens\[7\] is not UTF-8"),
        (byte_level(tokens=put(TOKENS, 7, TOKENS[8])), "more than once"),
        (byte_level(token_type=np.arange(3)), "token_type has 3 entries"),
        (byte_level(token_type=np.full(265, np.nan)), "token_type must be an array of whole numbers"),
        (byte_level(token_type="x"), "token_type must be an array"),
        (byte_level(merges=None), "merges is missing"),
        (byte_level(merges=put(MERGES, 2, "lo")), r"merges\[2\]"),
        (byte_level(merges=put(MERGES, 2, "")), r"merges\[2\]"),
        (byte_level(merges=put(MERGES, 2, "l z")), "merges and tokenizer.ggml.tokens do not fit"),
        (byte_level(bos_token_id=265), "bos_token_id is 265, and there are 265 tokens"),
        (byte_level(eot_token_id=-1), "eot_token_id is -1"),
        (byte_level(eos_token_id="x"), "eos_token_id must be a token id"),
        (byte_level(eos_token_id=True), "eos_token_id must be a token id"),
        (byte_level(add_bos_token=1), "add_bos_token must be true or false"),
        (byte_level(**{"tokenizer.chat_template": 1}), "chat_template must be a string"),
        (byte_level(**{"tokenizer.chat_template": "\udc80"}), "chat_template is not UTF-8"),
        (byte_level(**{"general.sampling.temp": "hot"}), "temp must be a number"),
        (sentences(scores=None), "scores is missing"),
        (sentences(scores=np.zeros(4)), "scores has 4 entries"),
        (sentences(scores=np.full(269, np.nan)), "NaN"),
        (sentences(token_type=np.full(269, BYTE)), "no SentencePiece vocabulary"),
        (sentences(tokens=[f"t{i}" for i in range(269)]), "no SentencePiece vocabulary"),
        (sentences("t5", unknown_token_id=0, precompiled_charsmap=np.arange(7)), "no SentencePiece vocabulary"),
    ],
)
def test_a_broken_vocabulary_is_named(metadata, words):
    with pytest.raises(CheckpointError, match=words) as raised:
        gguf_text(metadata, "here.gguf")
    assert raised.value.message.startswith("here.gguf: ")


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        (byte_level(model="rwkv"), ["'rwkv'", "gpt2", "bert"]),
        (byte_level(pre="new-bpe"), ["'new-bpe'", "llama-bpe", "qwen2"]),
    ],
)
def test_what_is_not_served_is_named_with_what_is(metadata, names):
    with pytest.raises(ConfigError) as raised:
        gguf_text(metadata, "here.gguf")
    assert all(name in raised.value.message for name in names)


def test_a_template_that_does_not_compile_is_refused(tmp_path):
    file = write(tmp_path / "m.gguf", byte_level(**{"tokenizer.chat_template": "{% if %}"}))
    with pytest.raises(ConfigError, match=r"m\.gguf.*does not compile"):
        TextModel.open(file, FakeEngine(), "m")
    write(file, byte_level(**{"general.sampling.top_p": 7.0}))
    with pytest.raises(ConfigError, match=r"m\.gguf.*top_p"):
        TextModel.open(file, FakeEngine(), "m")


def test_values_of_any_kind_raise_nothing_else():
    draw = random.Random(1)
    odd: list[Any] = [None, True, -1, 3, 10**12, 0.5, float("nan"), "", "x", [], ["a"], [1], [["a"]]]
    odd += [np.arange(265), np.zeros(269, np.float32), np.zeros((2, 2)), np.zeros(0), np.array([True] * 265)]
    for good in (byte_level(), sentences(), sentences("t5"), byte_level(model="bert"), byte_level(model="gemma4")):
        for _ in range(60):
            metadata = dict(good)
            for key in draw.sample([*good, "tokenizer.ggml.add_space_prefix", "general.sampling.temp"], 2):
                metadata[key] = draw.choice(odd)
            try:
                tokenizer = build({k: v for k, v in metadata.items() if v is not None})
                tokenizer.decode(tokenizer.encode("hello <s> ab\n"))
            except JaxserveError:
                pass


def test_long_texts_take_no_longer_a_character():
    """A cut by a pattern that looks ahead over a whole run would take the square of its length."""
    seen = set()
    for pre, family in _FAMILIES.items():
        if family.splits not in seen:
            seen.add(family.splits)
            tokenizer = build(byte_level(pre=pre))
            for run in ("1", " ", "a", "Aa", "!", "a ", " \n", "你"):
                start = time.process_time()
                tokenizer.encode(run * (40_000 // len(run)))
                assert time.process_time() - start < 1.0, (pre, run)
