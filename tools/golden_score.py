"""Writes tests/goldens/score.json: log-likelihoods and perplexities that transformers computes in float32.

Needs the environment that tools/golden.py describes, and the folder of reference models and texts that tests call
`shared_data`:

    ORACLE/bin/python tools/golden_score.py ../shared/data

Texts are cut into tokens by the `tokenizers` library: transformers 5 loses leading spaces of Llama tokenizers. Of the
folder's own texts nothing is copied, only what the models say of them: HellaSwag's rows by their index, WikiText-2 by
the number of its bytes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = 4
WIKITEXT_BYTES = 24000
PAIRS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is", " a dog."),
    ("Question: What is 7 plus 5?\nAnswer: ", "12"),  # the space goes to the continuation
    ("Once upon a time there was a", "n old man"),  # the tokenizer may join the two
    ("", "Once upon a time"),
    ("One", " two three four five six seven eight nine ten eleven twelve"),
]


class Oracle:
    def __init__(self, path: Path):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        config = self.model.config
        self.context = config.max_position_embeddings
        self.prefix = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> np.ndarray:
        """[T - 1, V]: what the model says after each token but the last."""
        logits = self.model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        return torch.log_softmax(logits.double(), dim=-1).numpy()

    def pair(self, context: str, continuation: str) -> dict:
        """As lm-evaluation-harness scores it."""
        stripped = context.rstrip()
        if stripped:
            ids, start = self.encode(context + continuation), len(self.encode(stripped))
        else:
            ids, start = [self.prefix, *self.encode(continuation, special=False)], 1
        found = self.logprobs(ids)[start - 1 :]
        target = np.array(ids[start:])
        return {
            "token_ids": target.tolist(),
            "token_logprobs": [round(float(x), 6) for x in found[np.arange(len(target)), target]],
            "is_greedy": bool((found.argmax(-1) == target).all()),
        }

    def perplexities(self, text: str) -> dict[str, float]:
        """`stride`: of a window that slides over the text by half its length; `chunks`: as llama-perplexity cuts it."""
        self.tokenizer.encode_special_tokens = True  # WikiText's <unk> is text
        ids = self.encode(text.removesuffix("\n"))
        context, found = self.context, {}
        stride, nll = context // 2, []
        for start in range(0, max(1, len(ids) - context + stride), stride):
            window = ids[start : start + context]
            says = self.logprobs(window)
            nll += [-says[i - 1, window[i]] for i in range(context - stride if start else 1, len(window))]
        assert len(nll) == len(ids) - 1
        found["stride"] = float(np.exp(np.mean(nll)))
        nll = []
        for start in range(0, len(ids) - context + 1, context):
            chunk = [self.prefix, *ids[start + 1 : start + context]] if ids[0] == self.prefix else ids[start:][:context]
            says = self.logprobs(chunk)
            nll += [-says[i - 1, chunk[i]] for i in range(context // 2 + 1, context)]
        found["chunks"] = float(np.exp(np.mean(nll)))
        return {kind: round(value, 5) for kind, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of reference models and texts")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "goldens" / "score.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    data = arguments.data

    embedded = Oracle(REPOSITORY / "jaxserve" / "embedded")
    pairs = [{"context": c, "continuation": e, **embedded.pair(c, e)} for c, e in PAIRS]
    rows = [json.loads(line) for line in (data / "eval/hellaswag_val_1000.jsonl").read_text().splitlines()]
    text = (data / "eval/wikitext-2/test.txt").read_bytes()[:WIKITEXT_BYTES].decode()
    shared = {}
    for name in ("stories260K", "babyllama361"):
        oracle = Oracle(data / "models" / name)
        fitting = [
            i for i, r in enumerate(rows) if max(len(oracle.encode(r["ctx"] + " " + e)) for e in r["endings"]) < 256
        ]
        shared[name] = {
            "hellaswag": {
                str(i): [oracle.pair(rows[i]["ctx"], " " + ending) for ending in rows[i]["endings"]]
                for i in fitting[:ROWS]
            },
            "wikitext": {"bytes": WIKITEXT_BYTES, "perplexity": oracle.perplexities(text)},
        }
        print(name, shared[name]["wikitext"])
    versions = {module.__name__: module.__version__ for module in (transformers, torch, tokenizers)}
    arguments.out.write_text(json.dumps({"versions": versions, "embedded": pairs, "shared": shared}, indent=1) + "\n")


if __name__ == "__main__":
    main()
