"""Scoring: where a continuation begins, its log-likelihood against transformers', what is computed, and the command."""

import io
import json
import sys
from pathlib import Path

import pytest

from jaxserve import LLM, cli
from jaxserve.cli.score import read_rows, score_all
from jaxserve.errors import InvalidParameter, PromptTooLong
from jaxserve.request import SamplingParams
from jaxserve.score import ScoreOutput, choose, encode_pair
from jaxserve.text import TextModel

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "score.json").read_text())


@pytest.fixture(scope="module")
def llm():
    with LLM(
        max_num_seqs=8, max_num_batched_tokens=64, block_size=1, num_kv_pages=512, max_model_len=96,
        dtype="float32", kv_cache_dtype="float32",
    ) as model:  # fmt: skip
        yield model


def computed(llm) -> int:
    """Tokens that the engine has computed."""
    lines = [line for line in llm.metrics_text().splitlines() if line.startswith("jaxserve_computed_tokens_total{")]
    return int(float(lines[0].split()[-1]))


def in_trie(sequences) -> int:
    """Tokens that are left when what begins alike is counted once."""
    return len({tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))})


# --- where a continuation begins ------------------------------------------------------------------------------------


class Letters:
    """A token a letter, but `bc` is one; BOS 0 before a text, if there is one."""

    def __init__(self, bos):
        self.bos_token_id = bos

    def encode(self, text, *, add_special_tokens=True, parse_special=False):
        assert parse_special, "the text of a control token is that token, as in any prompt"
        ids = [ord(letter) for letter in text.replace("bc", "B")]
        return [self.bos_token_id, *ids] if add_special_tokens and self.bos_token_id is not None else ids


def letters(bos=None) -> TextModel:
    return TextModel(None, Letters(bos), None, "letters", SamplingParams(), eos_token_ids=(1,))


@pytest.mark.parametrize(
    ("bos", "context", "continuation", "want", "start"),
    [
        (None, "xy", "z", "xyz", 2),
        (0, "xy", "z", "\0xyz", 3),
        (0, "xy  ", "z", "\0xy  z", 3),  # white space goes to the continuation
        (0, "xy\n", " z", "\0xy\n z", 3),
        (None, "ab", "cd", "aBd", 2),  # the joined token counts as the context's
        (0, "", "z", "\0z", 1),
        (0, " ", "z", "\0 z", 1),
        (None, "", "z", "\1z", 1),  # EOS where there is no BOS
        (None, "", "\1z", "\1z", 1),
        (0, [7, 8], "z", "\7\10z", 2),
        (0, "xy", [9], "\0xy\t", 3),
    ],
)
def test_where_a_continuation_begins(bos, context, continuation, want, start):
    ids, at = encode_pair(letters(bos), context, continuation)
    assert (list(ids), at) == ([ord(letter) for letter in want], start)


@pytest.mark.parametrize(("context", "continuation"), [("xy", ""), ("xab", "c"), ([], "z"), ([5], []), ("", "")])
def test_nothing_to_score_is_refused(context, continuation):
    with pytest.raises(InvalidParameter, match="at least one token of its own"):
        encode_pair(letters(), context, continuation)


def test_the_likeliest_choice_by_length():
    def output(logprob, tokens):
        return ScoreOutput(logprob, [0] * tokens, [], False, 1, 0)

    outputs = [output(-4.0, 1), output(-6.0, 2), output(-6.5, 2), output(-4.0, 1)]
    # By byte: -2, -3, -0.5, -2; by token: -4, -3, -3.25, -4.
    assert choose(outputs, ["é", "ab", "a" * 13, "bc"]) == (0, 2, 1)


# --- what the model says --------------------------------------------------------------------------------------------


def check(scores, golden):
    for score, want in zip(scores, golden, strict=True):
        assert score.token_ids == want["token_ids"]
        assert score.token_logprobs == pytest.approx(want["token_logprobs"], abs=1e-3)
        assert score.logprob == pytest.approx(sum(want["token_logprobs"]), abs=1e-3)
        assert score.is_greedy == want["is_greedy"]


def test_log_likelihoods_are_those_of_transformers(llm):
    pairs = GOLDEN["embedded"]
    for _ in range(2):  # the second time from the prefix cache
        scores = llm.score([p["context"] for p in pairs], [p["continuation"] for p in pairs])
        check(scores, pairs)
    assert any(s.num_cached_tokens for s in scores) and any(s.is_greedy for s in scores)


def test_what_begins_alike_is_computed_once(llm):
    context = "A small cat sat on the warm stone by the old river, and it looked at the"
    endings = [" water.", " stars and the moon.", " dog", " old man who had come there."]
    pairs = [encode_pair(llm.text, context, ending) for ending in endings]
    before = computed(llm)
    scores = llm.score([context] * 4, endings)
    cost = computed(llm) - before
    # The last token of each is only predicted; that of the context is computed by all: each looks at what follows.
    assert cost == in_trie([ids[:start] for ids, start in pairs]) + 3 + sum(len(i) - s - 1 for i, s in pairs)
    alone = [llm.score([context], [ending])[0] for ending in endings]
    for together, single in zip(scores, alone, strict=True):
        assert together.token_logprobs == single.token_logprobs, "the same bit for bit, whatever is in the step"


def test_the_longest_prompt_that_is_scored_has_one_token_more_than_the_context(llm):
    ids = [5 + i % 60 for i in range(97)]
    (whole,) = llm.score([ids[:3]], [ids[3:]])
    (shorter,) = llm.score([ids[:3]], [ids[3:96]])
    assert whole.token_logprobs[:-1] == shorter.token_logprobs and len(whole.token_logprobs) == 94
    with pytest.raises(PromptTooLong, match="maximum context length is 96"):
        llm.score([ids[:3]], [[*ids[3:], 5]])
    with pytest.raises(PromptTooLong):
        llm.generate([ids], SamplingParams(max_tokens=1))


def test_a_position_that_is_no_place_to_score_from_is_refused(llm):
    for params in ({"prompt_logprobs": 0, "prompt_logprobs_from": 3}, {"prompt_logprobs_from": 1}):
        with pytest.raises(InvalidParameter) as error:
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=0, **params))
        assert error.value.param == "prompt_logprobs_from"
    output = llm.generate(
        [5, 6, 7, 8], SamplingParams(max_tokens=2, prompt_logprobs=1, prompt_logprobs_from=2, ignore_eos=True)
    )
    assert [entry is not None for entry in output.prompt_logprobs] == [False, False, True, True]
    assert len(output.outputs[0].token_ids) == 2


@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_hellaswag_is_scored_as_by_transformers_and_computed_once(shared_data, name):
    lines = (shared_data / "eval/hellaswag_val_1000.jsonl").read_text().splitlines()[:40]
    rows = [json.loads(line) for line in lines]
    model = str(shared_data / "models" / name)
    with LLM(model, block_size=1, max_num_seqs=16, max_num_batched_tokens=256, num_kv_pages=8192) as llm:
        pairs, fitting = [], []
        for i, row in enumerate(rows):
            found = [encode_pair(llm.text, row["ctx"], " " + ending) for ending in row["endings"]]
            if max(len(ids) for ids, _ in found) <= llm.info.max_model_len:
                pairs += found
                fitting.append(i)
        scores = llm.score([ids[:start] for ids, start in pairs], [ids[start:] for ids, start in pairs])
        cost = computed(llm)
    for i, golden in GOLDEN["shared"][name]["hellaswag"].items():
        at = 4 * fitting.index(int(i))
        check(scores[at : at + 4], golden)
    assert cost <= 1.05 * in_trie([ids for ids, _ in pairs])


# --- rows and the command -------------------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "context": "The capital of France is", "continuation": " Paris."},
    {"prompt": "The capital of France is", "labels": [" Paris", " a dog"], "answer": " Paris"},
    {"question": "The capital of France is", "choices": [" green", " Paris"], "answer": 0, "other": [1]},
    {"context": "x" * 600, "continuation": " y", "id": 7},
    {"context": [5, 6], "continuation": [7]},
]
BAD = [
    (b"[1]", "not a JSON object"),
    (b'{"context": "a"}', 'one of "continuation", "choices", "labels" is needed, got none'),
    (b'{"context": "a", "question": "b", "continuation": "c"}', 'got "context" and "question"'),
    (b'{"context": 3, "continuation": "c"}', '"context" must be a string or a list of token ids'),
    (b'{"prompt": "a", "labels": []}', '"labels" must be a list of strings'),
    (b'{"prompt": "a", "labels": ["x"], "answer": 1}', '"answer" must be one of "labels", or its index from 0; got 1'),
    (b'{"prompt": "a", "labels": ["x"], "answer": "y"}', "got 'y'"),
    (b'{"prompt": "a", "labels": ["x", ""]}', "at least one token of its own"),
    (b'{"context": [5, -1], "continuation": [6]}', "out of range"),
]


def scored(llm, lines, **options):
    out = io.BytesIO()
    totals = llm._call(score_all(llm.text, read_rows(lines, **options), out))
    return totals, [json.loads(line) for line in out.getvalue().splitlines()]


def test_rows_come_back_in_order(llm):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    totals, answers = scored(llm, [lines[0], b"\n", *lines[1:]])
    assert [a["line"] for a in answers] == [1, 3, 4, 5, 6] and [a.get("id") for a in answers] == [
        "a",
        *[None] * 2,
        7,
        None,
    ]
    paris = llm.score([ROWS[0]["context"]], [" Paris."])[0]
    assert answers[0]["logprob"] == paris.logprob and answers[0]["num_tokens"] == len(paris.token_ids)
    assert [s["text"] for s in answers[1]["scores"]] == [" Paris", " a dog"]
    assert [answers[1][k] for k in ("best", "best_bytes", "best_tokens", "answer")] == [0, 0, 0, 0]
    assert answers[2]["best"] == 1 and answers[2]["answer"] == 0
    assert answers[3]["error"]["type"] == "PromptTooLong" and answers[3]["error"]["message"].startswith("line 5: ")
    assert answers[4]["logprob"] == llm.score([[5, 6]], [[7]])[0].logprob
    assert (totals.rows, totals.failed, totals.answered) == (5, 1, 2)
    assert totals.right == {"acc": 1, "acc_bytes": 1, "acc_tokens": 1}
    assert "acc         0.5000 +/- 0.5000" in totals.lines()


def test_bad_rows_are_told_by_line(llm):
    totals, answers = scored(llm, [line for line, _ in BAD])
    for number, ((_, said), answer) in enumerate(zip(BAD, answers, strict=True), start=1):
        message = answer["error"]["message"]
        assert answer["line"] == number and message.startswith(f"line {number}") and said in message
        assert message.count("line ") == 1
    assert totals.failed == len(BAD)


def test_more_labels_than_run_at_once_share_their_prompt(llm):
    row = {"prompt": "One two three four five six seven eight nine ten", "labels": [f" {i}" for i in range(100, 160)]}
    before = computed(llm)
    totals, (answer,) = scored(llm, [json.dumps(row).encode()])
    assert len(answer["scores"]) == 60 and computed(llm) - before == totals.computed_tokens < totals.prompt_tokens / 2
    delimited = scored(llm, [json.dumps({"prompt": "One", "labels": ["two"]}).encode()], delimiter=" ")[1][0]
    assert delimited["scores"][0]["logprob"] == llm.score(["One"], [" two"])[0].logprob
    assert delimited["scores"][0]["text"] == "two"


def test_the_command(tmp_path, capsys, llm):
    parquet = pytest.importorskip("pyarrow.parquet")
    source, out, table = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "tokens.parquet"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    engine = ["--max-num-seqs=8", "--max-num-batched-tokens=64", "--num-kv-pages=512", "--max-model-len=96"]
    exact = ["--dtype=float32", "--kv-cache-dtype=float32"]
    argv = ["score", str(source), str(out), *engine, *exact, "--logprobs", str(table)]
    assert cli.call(argv) == 1, "a row was too long"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "rows        5, of which 1 failed" and said[2].startswith("acc ") and len(said) == 5
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["line"] for a in answers] == [1, 2, 3, 4, 5]
    rows = parquet.read_table(table).to_pylist()
    paris = llm.score([ROWS[0]["context"]], [" Paris."])[0]
    first = [row for row in rows if row["line"] == 1]
    assert [row["token_id"] for row in first] == paris.token_ids and "".join(r["token"] for r in first) == " Paris."
    assert [row["logprob"] for row in first] == pytest.approx(paris.token_logprobs)
    assert [row["position"] for row in first] == [paris.context_tokens + i for i in range(len(first))]
    assert {(row["line"], row["continuation"]) for row in rows} == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (5, 0)}


def test_without_pyarrow_or_files_the_cure_is_named(tmp_path, capsys, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli.call(["score", str(source), str(tmp_path / "out"), "--logprobs", str(tmp_path / "t.parquet")]) == 2
    assert "pip install 'jaxserve[offline]'" in capsys.readouterr().err
    assert cli.call(["score", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "cannot open " in capsys.readouterr().err
