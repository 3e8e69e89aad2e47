"""The model of lm-evaluation-harness: its numbers are LLM's own, and a task runs from local data."""

import json
import os

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval, to run these tests")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxserve.errors import ConfigError, InvalidParameter, UnsupportedParameter  # noqa: E402
from jaxserve.lm_eval import JaxserveLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own dependencies warn


@pytest.fixture(scope="module")
def model():
    arguments = "max_num_seqs=8,max_num_batched_tokens=64,num_kv_pages=512,max_model_len=96"
    found = get_model("jaxserve").create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert isinstance(found, JaxserveLM)
    yield found
    found.llm.close()


def instances(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def test_loglikelihood(model):
    pairs = [("The capital of France is", " Paris."), ("The capital of France is ", "Paris."), ("", "Once upon")]
    found = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    scores = model.llm.score([c for c, _ in pairs], [e for _, e in pairs])
    assert found == [(s.logprob, s.is_greedy) for s in scores] and found[0] == found[1]


def test_a_context_that_is_too_long_is_cut_from_the_left(model):
    long = "one two three four five six seven eight nine ten " * 20
    ids, (rest,) = model.tok_encode(long), [model.tok_encode(" x", add_special_tokens=False)]
    (found,) = model._loglikelihood_tokens([((long, " x"), ids, rest)], disable_tqdm=True)
    (want,) = model.llm.score([ids[-(97 - len(rest)) :]], [rest])
    assert found == (want.logprob, want.is_greedy)
    with pytest.raises(InvalidParameter, match="does not fit"):
        model._loglikelihood_tokens([(None, ids[:3], ids[:97])])


def test_rolling_scores_every_token_once(model):
    text = "Once upon a time there was a cat. " * 24
    ids = model.tok_encode(text)
    assert len(ids) > 2 * model.max_length
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    n, prefix, total = model.max_length, model.prefix_token_id, 0.0
    for start in range(0, len(ids), n):  # windows of n predictions; the last one reaches back for context
        end = min(start + n, len(ids))
        before = [prefix] if start == 0 else ids[max(0, end - n - 1) : start]
        total += model.llm.score([before], [ids[start:end]])[0].logprob
    assert found == pytest.approx(total)


def test_generate_until(model):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.apply_chat_template(question)
    assert model.tok_encode(prompt) == list(model.llm.text.encode_chat(question))
    stops = {"until": ["Paris"], "max_gen_toks": 20, "do_sample": False}
    found = model.generate_until(instances("generate_until", (prompt, {"max_gen_toks": 20}), (prompt, stops)), True)
    assert "Paris" in found[0] and found[1] == found[0][: found[0].index("Paris")]
    with pytest.raises(InvalidParameter, match="num_beams is not served"):
        model.generate_until(instances("generate_until", (prompt, {"num_beams": 4})))
    assert model.chat_template(True) and model.chat_template(False) is None and model.tokenizer_name
    with pytest.raises(UnsupportedParameter, match="by name"):
        model.chat_template("other")
    with pytest.raises(ConfigError, match="JAX_PLATFORMS"):
        JaxserveLM(device="cuda")


def test_a_task_from_local_data(model, tmp_path):
    rows = [
        {"question": "The capital of France is", "choices": ["Paris", "green stones"], "answer": 0},
        {"question": "Once upon a", "choices": ["xylophone", "time"], "answer": 1},
        {"question": "The capital of Spain is", "choices": ["Madrid", "a dog"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(model, tasks=["local"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for row in rows:
        scores = model.llm.score([row["question"]] * 2, [f" {choice}" for choice in row["choices"]])
        right += max((0, 1), key=lambda i: scores[i].logprob) == row["answer"]
    assert found["results"]["local"]["acc,none"] == pytest.approx(right / 3) and right == 2
