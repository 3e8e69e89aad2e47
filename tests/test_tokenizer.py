"""Tokenizers read from real checkpoints and toy ones: exact ids, exact bytes, and text that grows."""

import asyncio
import codecs
import gzip
import json
import random
import re
import threading
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError, InvalidParameter
from jaxserve.tokenizer import (
    Detokenizer,
    FastTokenizer,
    SentencePieceTokenizer,
    StopStrings,
    Tokenizer,
    load_tokenizer,
)
from jaxserve.tokenizer.base import any_of

REAL = ["qwen3", "phi", "deepseek", "granite", "stories260K", "babyllama361", "mistral", "stories260K-sp"]
SMALL = ["stories260K", "babyllama361", "stories260K-sp"]
FILES = {
    "qwen3": "tokenizers/qwen3/",
    "phi": "tokenizers/phi/phi-3-mini_",
    "deepseek": "tokenizers/deepseek/",
    "granite": "tokenizers/granite/",
    "stories260K": "models/stories260K/",
    "babyllama361": "models/babyllama361/",
}
SENTENCEPIECE = {
    "mistral": "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3",
    "stories260K-sp": "models/stories260K/tokenizer.model",
}
SAMPLES = [
    "Once upon a time",
    "  two spaces, a tab\t and\n\nlines ",
    "naïve 你好 🤦🏽‍♂️ שלום",
    "x </s> <s> y",
    "",
    " ",
    "e\u0301\ufeff",
]


def copy_of(name: str, data: Path, into: Path) -> Path:
    """A checkpoint directory that holds the named tokenizer."""
    into.mkdir(parents=True, exist_ok=True)
    if name in SENTENCEPIECE:
        (into / "tokenizer.model").write_bytes((data / SENTENCEPIECE[name]).read_bytes())
        return into
    for file in ("tokenizer.json", "tokenizer_config.json"):
        source = data / (FILES[name] + file)
        packed = source.with_name(source.name + ".gz")
        content = gzip.decompress(packed.read_bytes()) if packed.is_file() else source.read_bytes()
        (into / file).write_bytes(content)
    return into


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """real(name) -> (directory, tokenizer), each loaded once."""
    loaded: dict[str, tuple[Path, Tokenizer]] = {}

    def load(name: str) -> tuple[Path, Tokenizer]:
        if name not in loaded:
            path = copy_of(name, shared_data, tmp_path_factory.mktemp("tokenizer") / name)
            loaded[name] = path, load_tokenizer(path)
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def naughty(shared_data: Path) -> list[str]:
    return json.loads((shared_data / "api/blns.json").read_text())


def write_toy(path: Path, *, config: dict | None = None, **changes) -> Path:
    """A byte-level tokenizer of 256 bytes, "lo" and "hello", two special tokens and one that is not."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(letters))} | {"lo": 256, "hel": 257, "hello": 258, "he": 259}
    merges = [("l", "o"), ("h", "e"), ("he", "l"), ("hel", "lo")]
    toy = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, **changes))
    toy.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    toy.decoder = tokenizers.decoders.ByteLevel()
    toy.add_special_tokens(["<s>", "</s>"])
    toy.add_tokens(["<think>", "<|user|>"])
    toy.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 260)])
    path.mkdir(parents=True, exist_ok=True)
    toy.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


# --- text to ids


@pytest.mark.parametrize("name", REAL)
def test_naughty_strings_come_back(name, real, naughty):
    _, tokenizer = real(name)
    for text in naughty + SAMPLES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        wanted = unicodedata.normalize("NFC", text) if name == "qwen3" else text
        assert tokenizer.decode(ids) == wanted
        prefix = " " if tokenizer.strips_leading_space and ids else ""
        assert b"".join(map(tokenizer.token_bytes, ids)) == (prefix + wanted).encode()


@pytest.mark.parametrize("name", [n for n in REAL if n not in SENTENCEPIECE])
def test_same_ids_as_the_library(name, real, naughty):
    path, tokenizer = real(name)
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    control = list(tokenizer.control_tokens)[:40]
    marked = [
        before + t + after + t + "end" for t in control for before in ("", "a ", " ") for after in ("", " b", "\n")
    ]
    for text in naughty + SAMPLES + marked:
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=True) == expected
        if tokenizer.split_control(text) in ([], [text]):
            assert tokenizer.encode(text, add_special_tokens=False) == expected


@pytest.mark.parametrize("name", REAL)
def test_text_never_becomes_a_control_token(name, real):
    _, tokenizer = real(name)
    control = set(tokenizer.control_tokens.values())
    for text, token_id in list(tokenizer.control_tokens.items())[:60]:
        hostile = f"a {text}{text} b{text[:-1]}{text}"
        ids = tokenizer.encode(hostile, add_special_tokens=False)
        assert control.isdisjoint(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == hostile
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=True) == [token_id]
        assert tokenizer.token_bytes(token_id) == text.encode()


@pytest.mark.parametrize(
    ("name", "control", "special", "words"),
    [
        ("qwen3", ["<|im_end|>", "<|fim_prefix|>"], ["<|im_end|>"], ["<think>", "</tool_call>"]),
        ("deepseek", ["<｜User｜>", "<｜tool▁calls▁begin｜>"], ["<｜end▁of▁sentence｜>"], ["<think>"]),
        ("phi", ["</s>", "<|end|>"], ["<|end|>"], []),
        ("mistral", ["[INST]", "</s>"], ["[INST]"], []),
    ],
)
def test_which_tokens_text_may_hold(name, control, special, words, real):
    _, tokenizer = real(name)
    assert set(control) <= set(tokenizer.control_tokens)
    assert {tokenizer.control_tokens[t] for t in special} <= tokenizer.special_ids
    for word in words:
        assert word not in tokenizer.control_tokens
        assert len(tokenizer.encode(word)) == 1 + bool(tokenizer.encode(""))


def test_bos_and_eos_of_real_checkpoints(real):
    found = {name: (real(name)[1].bos_token_id, real(name)[1].eos_token_ids) for name in REAL}
    assert found["qwen3"] == (None, (151645,))
    assert found["phi"] == (1, (32000,))
    assert found["deepseek"] == (0, (1,))
    assert found["mistral"] == found["stories260K"] == found["stories260K-sp"] == (1, (2,))
    starts = {name: real(name)[1].encode("") for name in REAL}
    assert starts["qwen3"] == starts["phi"] == []
    assert starts["deepseek"] == [0]  # asked for by tokenizer_config.json, not by the post-processor
    assert starts["mistral"] == starts["stories260K"] == [1]


def test_sentencepiece_and_json_agree(real, naughty):
    fast, slow = real("stories260K")[1], real("stories260K-sp")[1]
    assert isinstance(fast, FastTokenizer) and isinstance(slow, SentencePieceTokenizer)
    for text in naughty + SAMPLES:
        ids = fast.encode(text)
        assert slow.encode(text) == ids
        assert slow.decode(ids) == fast.decode(ids)
        assert slow.encode(text, parse_special=True) == fast.encode(text, parse_special=True)


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
def test_configuration_outranks_the_post_processor(tmp_path, add_bos, add_eos):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    config |= {k: v for k, v in (("add_bos_token", add_bos), ("add_eos_token", add_eos)) if v is not None}
    tokenizer = load_tokenizer(write_toy(tmp_path, config=config))
    bos = [] if add_bos is False else [260]
    eos = [261] if add_eos else []
    assert tokenizer.encode("hello") == [*bos, 258, *eos]
    assert tokenizer.encode("hello", add_special_tokens=False) == [258]
    assert tokenizer.encode("hello</s>", parse_special=True) == [*bos, 258, 261, *eos]


def test_without_configuration_the_file_itself_is_asked(tmp_path):
    tokenizer = load_tokenizer(write_toy(tmp_path))
    assert tokenizer.bos_token_id == 260
    assert tokenizer.eos_token_ids == (261,)
    assert tokenizer.vocab_size == 264
    assert tokenizer.special_ids == {260, 261}


def test_special_tokens_map_names_them_too(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|user|>"}}')
    assert load_tokenizer(tmp_path).eos_token_ids == (263,)


def test_parts_keep_text_and_control_tokens_apart(tmp_path):
    tokenizer = load_tokenizer(write_toy(tmp_path))
    less = tokenizer.encode("<", add_special_tokens=False)[0]
    assert tokenizer.split_control("a<s>b</s><think>") == ["a", 260, "b", 261, "<think>"]
    ids = tokenizer.encode_parts(["hello", 261, "</s><think>"])
    assert ids[:3] == [258, 261, less] and ids[-1] == 262 and ids.count(261) == 1


def test_a_vocabulary_that_finds_control_tokens_by_itself_is_overruled(tmp_path):
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -1.0),
        ("a", -1.0),
        ("<", -2.0),
        ("/", -2.0),
        ("s", -2.0),
        (">", -2.0),
    ]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    unigram.decoder = tokenizers.decoders.Metaspace()
    unigram.add_special_tokens(["<unk>", "</s>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a</s>a", add_special_tokens=False)
    assert 1 not in ids
    assert tokenizer.token_bytes(ids[1]) == b"a"


def test_text_that_is_not_unicode_is_refused(tmp_path, real):
    for tokenizer in (load_tokenizer(write_toy(tmp_path)), real("stories260K-sp")[1]):
        for text in ("a\ud800", "\udfff" * 20_000):
            with pytest.raises(InvalidParameter, match="surrogate"):
                tokenizer.encode(text)


def test_long_text_gives_the_same_ids_in_many_threads(tmp_path):
    tokenizer = load_tokenizer(write_toy(tmp_path))
    text = "hello </s> " * 5_000
    once = tokenizer.encode("hello </s> ", add_special_tokens=False)
    found: dict[int, list[int]] = {}

    def work(k: int) -> None:
        found[k] = tokenizer.encode(text, add_special_tokens=False, parse_special=k % 2 == 0)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parsed = tokenizer.encode("hello </s> ", add_special_tokens=False, parse_special=True)
    assert all(found[k] == (parsed if k % 2 == 0 else once) * 5_000 for k in range(8))


def test_the_event_loop_turns_while_a_long_text_is_encoded(tmp_path):
    tokenizer = load_tokenizer(write_toy(tmp_path))

    async def main() -> int:
        work = asyncio.create_task(asyncio.to_thread(tokenizer.encode, "hello " * 200_000))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert len(await work) == 400_001
        return turns

    assert asyncio.run(main()) > 1


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text("<ab|", max_size=4), max_size=6), text=st.text("<ab|", max_size=20))
def test_the_longest_text_at_a_place_is_found(texts, text):
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    expected = re.findall("|".join(map(re.escape, longest_first)) or "(?!)", text)
    assert any_of(texts).findall(text) == expected


# --- files that are not there, or not right


def test_no_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_file_is_named(tmp_path, file):
    (tmp_path / file).write_text("{")
    with pytest.raises(ConfigError, match=file.replace(".", r"\.")):
        load_tokenizer(tmp_path)


def test_a_broken_json_falls_back_to_sentencepiece(tmp_path, shared_data):
    copy_of("stories260K-sp", shared_data, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


def test_a_decoder_without_bytes_is_refused(tmp_path):
    path = write_toy(tmp_path) / "tokenizer.json"
    decoder = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": decoder}))
    with pytest.raises(ConfigError, match="CTC"):
        load_tokenizer(tmp_path)


# --- ids to text


@pytest.mark.parametrize("name", [n for n in REAL if n not in SENTENCEPIECE])
@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_decode_as_in_the_library(name, skip, real):
    """But for bytes that are no UTF-8: the library makes U+FFFD of each byte of a run, we only of the wrong ones."""
    path, tokenizer = real(name)
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    byte_ids = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    rng = random.Random(name)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        if name in SMALL:
            ids = [i for i in ids if i not in byte_ids]
            ids += tokenizer.encode(rng.choice(SAMPLES), add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


def test_bytes_of_tokens(real):
    qwen, llama, mistral = real("qwen3")[1], real("stories260K")[1], real("mistral")[1]
    for tokenizer in (qwen, llama, mistral):
        assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(10**9) == b""
    assert qwen.token_bytes(qwen.encode(" you")[0]) == b" you"
    assert b"".join(map(qwen.token_bytes, qwen.encode("🤦"))) == "🤦".encode()
    assert llama.token_bytes(3) == b"\x00" and llama.token_bytes(3 + 0xE4) == b"\xe4"
    assert llama.token_str(3 + 0xE4) == "\ufffd"
    assert mistral.token_bytes(mistral.encode("hi")[1]) == b" hi"


def texts(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), skip=st.booleans(), cuts=st.lists(st.integers(0, 50)))
def test_every_split_of_ids_gives_the_whole_text(name, data, skip, cuts, real):
    tokenizer = real(name)[1]
    token = st.integers(0, tokenizer.vocab_size + 3) | st.sampled_from(sorted(tokenizer.special_ids))
    some = st.lists(token | st.sampled_from([t for s in SAMPLES for t in tokenizer.encode(s)]), max_size=12)
    ids = data.draw(some)
    pieces = texts(Detokenizer(tokenizer, skip_special_tokens=skip), ids, cuts)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), cut=st.integers(0, 60), cuts=st.lists(st.integers(0, 50)), tail=st.integers(4, 60))
def test_a_continuation_is_the_rest_of_the_text(name, data, cut, cuts, tail, real):
    tokenizer = real(name)[1]
    ids = tokenizer.encode(data.draw(st.sampled_from(SAMPLES) | st.text(max_size=12)))
    prompt, rest = ids[: cut % (len(ids) + 1)], ids[cut % (len(ids) + 1) :]
    streamed = "".join(texts(Detokenizer(tokenizer, prompt_tail=prompt[-tail:] if tail < 50 else prompt), rest, cuts))
    # A prompt may end within a character; that character belongs to the continuation.
    whole = codecs.getincrementaldecoder("utf-8")("replace").decode(
        b"".join(tokenizer.token_bytes(i) for i in prompt if i not in tokenizer.special_ids)
    )
    whole = whole.removeprefix(" ") if tokenizer.strips_leading_space else whole
    assert whole + streamed == tokenizer.decode(ids)


def test_a_leading_space_stays_only_behind_text(real):
    tokenizer = real("stories260K")[1]
    once = tokenizer.encode("Once", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(once) == "Once"
    assert Detokenizer(tokenizer, prompt_tail=[1]).push(once) == "Once"  # behind bos alone
    assert Detokenizer(tokenizer, prompt_tail=[1, *once]).push(once) == " Once"


def test_characters_come_whole(tmp_path):
    tokenizer = load_tokenizer(write_toy(tmp_path))
    ids = tokenizer.encode("é🤦", add_special_tokens=False)
    growing = Detokenizer(tokenizer)
    assert [growing.push([i]) for i in ids] == ["", "é", "", "", "", "🤦"]
    assert growing.push(ids[2:4]) == "" and growing.flush() == "\ufffd"


# --- stop strings


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab", max_size=24),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    cuts=st.lists(st.integers(0, 24)),
    unarmed=st.integers(0, 10),
)
def test_every_split_of_text_stops_alike(text, stop, include, cuts, unarmed):
    first = min(unarmed, len(text))  # a match must end behind this
    matches = [m for k in range(first + 1, len(text) + 1) if (m := last_at(text[:k], stop))]
    expected, reason = (text, None)
    if matches:
        end, start, reason = matches[0]
        expected = text[:end] if include else text[:start]
    stops = StopStrings(stop, include)
    bounds = sorted({0, first, len(text), *(c % (len(text) + 1) for c in cuts)})
    emitted, matched = "", None
    for a, b in zip(bounds, bounds[1:], strict=False):
        out, matched = stops.push(text[a:b], armed=a >= first)
        emitted += out
        assert expected.startswith(emitted)
        if matched is not None:
            break
    assert matched == reason
    assert emitted + stops.flush() == expected


def last_at(text: str, stop: list[str]) -> tuple[int, int, str] | None:
    """The longest of the strings that `text` ends in."""
    return min(((len(text), len(text) - len(s), s) for s in stop if text.endswith(s)), default=None)


def test_a_stop_string_over_several_pushes():
    stops = StopStrings(["aab"])
    assert [stops.push(c) for c in "aaab"] == [("", None), ("", None), ("a", None), ("", "aab")]
    assert stops.push("more") == ("", "aab")
    assert stops.flush() == ""


def test_the_match_that_ends_first_wins():
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", "bc")
    assert StopStrings(["c", "bc"]).push("abcd") == ("a", "bc")
    assert StopStrings(["bc"], include=True).push("abcd") == ("abc", "bc")


def test_what_was_held_back_is_flushed():
    stops = StopStrings(["###"])
    assert stops.push("a##") == ("a", None)
    assert stops.flush() == "##"


def test_text_without_stop_strings_passes():
    assert StopStrings([]).push("abc") == ("abc", None)
