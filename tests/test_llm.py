"""The Python API on the embedded model."""

import math
import threading
import time

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError, EngineStopped, InvalidParameter, PromptTooLong

QUESTIONS = ["What is the capital of France?", "What is 7 plus 5?", "What is the capital of Spain?"]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def llm():
    with LLM(max_num_seqs=8, max_num_batched_tokens=64, num_kv_pages=24, max_model_len=320) as model:
        yield model


def ask(question):
    return [{"role": "user", "content": question}]


def test_chat_one_and_many(llm):
    one = llm.chat(ask(QUESTIONS[0]), GREEDY)
    assert "Paris" in one.outputs[0].text and one.outputs[0].finish_reason == "stop"
    many = llm.chat([ask(q) for q in QUESTIONS], GREEDY)
    for output, word in zip(many, ("Paris", "12", "Madrid"), strict=True):
        assert word in output.outputs[0].text
    assert many[0].outputs[0].token_ids == one.outputs[0].token_ids


def test_generate_takes_text_ids_and_lists(llm, capfd):
    ids = llm.text.encode_prompt("The capital of")
    text, tokens = llm.generate(["The capital of", ids], GREEDY)
    assert text.outputs[0].text == tokens.outputs[0].text and text.prompt == "The capital of" and tokens.prompt is None
    assert llm.generate("The capital of", GREEDY).outputs[0].text == text.outputs[0].text
    each = llm.generate([[5], [6]], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3, ignore_eos=True, n=2)])
    assert [len(o.token_ids) for o in each[1].outputs] == [3, 3] and len(each[0].outputs[0].token_ids) == 1
    assert llm.generate([], GREEDY) == []
    assert "requests" not in capfd.readouterr().err
    llm.generate([[5]] * 20, SamplingParams(max_tokens=1))
    assert "requests" in capfd.readouterr().err, "a long list shows its progress"


def test_ids_of_any_integer_type(llm):
    ids = np.arange(5, 45)
    assert llm.generate(ids, GREEDY).outputs[0].token_ids == llm.generate(ids.tolist(), GREEDY).outputs[0].token_ids
    assert llm.score([ids], [ids[:3]])[0].token_ids == [5, 6, 7]
    (only,) = llm.generate([ids], GREEDY)
    assert only.prompt_token_ids == ids.tolist()


def test_one_stop_string_is_no_list_of_letters():
    assert SamplingParams(stop="Paris") == SamplingParams(stop=("Paris",))


def test_closing_ends_the_calls_of_other_threads():
    llm = LLM(max_num_seqs=8, max_num_batched_tokens=64, num_kv_pages=24, max_model_len=320)
    ended = []

    def work():
        try:
            llm.generate([[5]] * 50, SamplingParams(max_tokens=300, ignore_eos=True))
        except EngineStopped as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while "running{" not in (text := llm.metrics_text()) or 'running{engine="0",model_name="jaxserve-tiny"} 0' in text:
        time.sleep(0.01)
    llm.close()
    thread.join(30)
    assert not thread.is_alive() and len(ended) == 1


def test_score(llm):
    prompt = "What is the capital of France?"
    asked = llm.text.encode_chat(ask(prompt))  # as text its last newline would count as the continuation's
    right, wrong = llm.score([asked] * 2, ["The capital of France is Paris.", "A dog is green."])
    assert right.logprob > wrong.logprob and right.is_greedy and not wrong.is_greedy
    assert right.logprob == pytest.approx(math.fsum(right.token_logprobs))
    assert len(right.token_ids) == len(right.token_logprobs)
    by_ids = llm.score([[5, 6]], [[7, 8, 9]])[0]
    whole = llm.generate([[5, 6, 7, 8, 9]], SamplingParams(max_tokens=0, prompt_logprobs=0))[0].prompt_logprobs
    assert by_ids.token_logprobs == pytest.approx([t.logprob for t in whole[2:]])


def test_logprobs_and_stop(llm):
    output = llm.chat(ask(QUESTIONS[0]), SamplingParams(temperature=0, max_tokens=40, logprobs=2, stop=("Paris",)))
    assert output.outputs[0].stop_reason == "Paris" and "Paris" not in output.outputs[0].text
    assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids)
    assert all(len(t.top) == 2 for t in output.outputs[0].logprobs)


def test_refusals(llm):
    with pytest.raises(PromptTooLong, match="maximum context length is 320"):
        llm.generate([[5], [5] * 400], GREEDY)
    with pytest.raises(InvalidParameter, match="2 prompts and 1 sampling"):
        llm.generate([[5], [6]], [GREEDY])
    with pytest.raises(InvalidParameter, match="2 prompts and 1 continuations"):
        llm.score([[5], [6]], [[7]])
    with pytest.raises(InvalidParameter, match="at least one token"):
        llm.score([[5]], [[]])
    with pytest.raises(InvalidParameter, match="a text or a sequence of token ids, got None"):
        llm.generate([None], GREEDY)
    with pytest.raises(InvalidParameter, match="params must be SamplingParams"):
        llm.generate("a", {"temperature": 1})
    with pytest.raises(InvalidParameter, match="must be lists"):
        llm.score("The capital of France is", " Paris.")
    with pytest.raises(ConfigError, match="no option 'tensor_parallel'"):
        LLM(tensor_parallel=2)
    with pytest.raises(ConfigError, match="dtype must be one of 'auto', 'float32', 'bfloat16', got 'int3'"):
        LLM(dtype="int3")
    with pytest.raises(ConfigError, match=r"max_num_seqs is wrong: Expected `int \| null`, got `str`"):
        LLM(max_num_seqs="8")
    assert "Paris" in llm.chat(ask(QUESTIONS[0]), GREEDY).outputs[0].text, "and goes on"


def test_metrics_and_close():
    llm = LLM(max_num_seqs=8, max_num_batched_tokens=64, num_kv_pages=24, max_model_len=320)
    llm.generate([[5]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert 'vllm:generation_tokens_total{engine="0",model_name="jaxserve-tiny"} 2.0' in llm.metrics_text()
    llm.close()
    llm.close()
    with pytest.raises(EngineStopped, match="closed"):
        llm.generate([[5]])
