"""Writes tests/goldens: tiny random checkpoints of every model family and what transformers computes with them.

An oracle, so it knows nothing of jaxserve and has an environment of its own, outside the repository:

    python3.11 -m venv ORACLE
    ORACLE/bin/pip install torch==2.13.0 transformers safetensors numpy    # the CPU build of torch
    ORACLE/bin/python tools/golden.py

The logits come from the files just written, read back, in float32, with eager attention and without a cache. A golden
that a wrong model also passes is worthless, so each is checked to move when any one ingredient is taken away: a bias, a
norm weight, the rope scaling, the window or one token of it.
"""

import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors
import torch
import transformers
from golden_models import GOLDENS, Golden
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

PROMPTS = 3
GREEDY_TOKENS = 24
CANDIDATES = 24  # prompts drawn at once; the first PROMPTS good ones are kept
MIN_GAP = 5e-3  # top-1 minus top-2 logit at every greedy step: far above float32 noise
MIN_DISTINCT = 8  # greedy tokens that differ: a model stuck on one token proves little
MIN_EFFECT = 1e-2  # how far the logits must move when an ingredient is taken away


def neutral_norm(model: torch.nn.Module) -> float:
    """The norm weight that changes nothing: Gemma adds 1 to it."""
    return 0.0 if model.config.model_type.startswith("gemma") else 1.0


def randomise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Weights large enough that attention is far from uniform; nothing is left at 0 or 1."""
    for name, weight in sorted(model.named_parameters()):
        if "norm" in name:
            values = rng.uniform(0.5, 1.5, weight.shape) - 1 + neutral_norm(model)
        else:
            std = 0.3 if "bias" in name or "embed" in name else 0.2
            if "embed" in name and neutral_norm(model) == 0:
                std = 0.1  # it is multiplied by sqrt(width): were it larger, each token would only predict itself
            values = rng.normal(0.0, std, weight.shape)
        weight.data.copy_(torch.from_numpy(values.astype(np.float32)))


def config_of(golden: Golden, **changes):
    # transformers completes the nested dicts it is given, in place.
    return AutoConfig.for_model(golden.model_type, **copy.deepcopy(golden.config | changes))


def write_checkpoint(golden: Golden, directory: Path, rng: np.random.Generator) -> None:
    model = AutoModelForCausalLM.from_config(config_of(golden), dtype=torch.float32)
    randomise(model, rng)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    sharding = {"max_shard_size": golden.shard_bytes} if golden.shard_bytes else {}
    model.to(golden.dtype).save_pretrained(directory, **sharding)
    if golden.shard_bytes:
        assert len(list(directory.glob("model-*.safetensors"))) >= 3, f"{golden.name}: lower shard_bytes"


def classic_config(golden: Golden, written: dict) -> dict:
    """The config in the spelling of transformers 4: rope_theta and rope_scaling, torch_dtype."""
    classic = {key: value for key, value in written.items() if key not in ("rope_parameters", "transformers_version")}
    scaling = dict(written["rope_parameters"])
    if "full_attention" in scaling:
        classic["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        scaling = dict(scaling["full_attention"])
    classic["rope_theta"] = scaling.pop("rope_theta")
    classic["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    classic["torch_dtype"] = classic.pop("dtype")
    classic |= golden.classic
    return dict(sorted((key, value) for key, value in classic.items() if key not in golden.classic_lacks))


def load(directory: Path, config=None):
    """The checkpoint in float32, whatever it is stored in: the only way in which this script gets logits."""
    config = {} if config is None else {"config": config}
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **config
    ).eval()


@torch.no_grad()
def logits(model, tokens: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()  # [B, T, V]


def continue_greedily(model, tokens: np.ndarray, new_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Next ids, their log-probabilities and their lead over the runner-up, each step a whole forward pass."""
    ids, logprobs, gaps = [], [], []
    for _ in range(new_tokens):
        last = logits(model, tokens)[:, -1]
        runner_up, best = np.sort(last)[:, -2:].T
        ids.append(last.argmax(-1))
        logprobs.append(best - np.logaddexp.reduce(last.astype(np.float64), axis=-1))
        gaps.append(best - runner_up)
        tokens = np.concatenate([tokens, ids[-1][:, None]], axis=1)
    stack = [np.stack(rows, axis=1) for rows in (ids, logprobs, gaps)]
    return stack[0].astype(np.int32), stack[1].astype(np.float32), stack[2].astype(np.float32)


def choose_prompts(golden: Golden, model, rng: np.random.Generator) -> np.ndarray:
    """Prompts whose greedy continuation has no close call, no end of sequence and some variety."""
    specials = max(np.atleast_1d(golden.config["eos_token_id"])) + 1  # ids below are never drawn, so never in a prompt
    tokens = rng.integers(specials, golden.config["vocab_size"], (CANDIDATES, golden.prompt_tokens))
    ids, _, gaps = continue_greedily(model, tokens, GREEDY_TOKENS)
    ends = np.isin(ids, golden.config["eos_token_id"]).any(1)
    varied = np.array([len(set(row)) >= MIN_DISTINCT for row in ids.tolist()])
    good = tokens[(gaps.min(1) >= MIN_GAP) & varied & ~ends]
    assert len(good) >= PROMPTS, f"{golden.name}: {len(good)} of {CANDIDATES} prompts are good; try another seed"
    return good[:PROMPTS].astype(np.int32)


def effects(golden: Golden, directory: Path, tokens: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """How far the logits move, at most, under each mistake."""
    moved = {}

    def record(mistake: str, model) -> None:
        moved[mistake] = float(np.abs(logits(model, tokens) - right).max())

    for mistake, changes in golden.mistakes.items():
        record(mistake, load(directory, config_of(golden, **changes)))
    # One kind of weight at a time is made neutral; q_proj at zero is uniform attention, qkv_proj none.
    kinds = {name.split(".", 3)[-1] if ".layers." in name else name for name, _ in load(directory).named_parameters()}
    for kind in sorted(kinds):
        if "norm" in kind or kind.endswith(("bias", "q_proj.weight", "q_b_proj.weight", "qkv_proj.weight")):
            model = load(directory)
            for name, weight in model.named_parameters():
                if name.endswith(kind):
                    weight.data.fill_(neutral_norm(model) if "norm" in kind else 0.0)
            record(kind, model)
    weak = {mistake: effect for mistake, effect in moved.items() if effect < MIN_EFFECT}
    assert not weak, f"{golden.name}: these change too little: {weak}; try another seed"
    return moved


def make(golden: Golden, directory: Path) -> str:
    """Writes one golden and returns its row of the README's table."""
    shutil.rmtree(directory, ignore_errors=True)
    rng = np.random.default_rng(golden.seed)
    write_checkpoint(golden, directory, rng)

    model = load(directory)
    tokens = choose_prompts(golden, model, rng)
    right = logits(model, tokens)
    greedy, greedy_logprobs, greedy_gaps = continue_greedily(model, tokens, GREEDY_TOKENS)
    assert greedy_gaps.min() >= MIN_GAP
    moved = effects(golden, directory, tokens, right)
    weakest = min(moved, key=moved.get)

    classic = classic_config(golden, json.loads((directory / "config.json").read_text()))
    (directory / "config.classic.json").write_text(json.dumps(classic, indent=2) + "\n")
    same = logits(load(directory, AutoConfig.for_model(**classic)), tokens)
    assert np.array_equal(same, right), f"{golden.name}: config.classic.json describes another model"

    np.savez_compressed(
        directory / "golden.npz",
        tokens=tokens,
        logits=right,
        greedy=greedy,
        greedy_logprobs=greedy_logprobs,
        greedy_gaps=greedy_gaps,
    )
    c = model.config
    scaling = c.rope_parameters
    local = scaling.get("sliding_attention")
    scaling = scaling.get("full_attention", scaling)
    head_dim = getattr(c, "qk_head_dim", None) or getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    windowed = getattr(c, "sliding_window", None) is not None
    layer_types = getattr(c, "layer_types", None) or ["sliding_attention"] * c.num_hidden_layers
    window_layers = [i for i, kind in enumerate(layer_types) if windowed and kind == "sliding_attention"]
    kib = sum(path.stat().st_size for path in directory.iterdir()) / 1024
    row = (
        golden.name,
        f"{c.hidden_size} / {c.intermediate_size} / {c.num_hidden_layers}",
        f"{c.num_attention_heads} / {c.num_key_value_heads} / {head_dim}",
        f"{c.vocab_size}{', tied' if c.tie_word_embeddings else ''}",
        f"{scaling['rope_type']} {scaling['rope_theta']:g}" + (f", local {local['rope_theta']:g}" if local else ""),
        f"{c.sliding_window} in layers {window_layers}" if window_layers else "-",
        str(golden.dtype).removeprefix("torch."),
        f"{golden.prompt_tokens}",
        f"{greedy_gaps.min():.4f}",
        f"{moved[weakest]:.2f} ({weakest})",
        f"{kib:.0f}",
    )
    return "| " + " | ".join(row) + " |"


COLUMNS = (
    *("golden", "hidden / ffn / layers", "heads / kv / head_dim", "vocabulary", "rope, theta", "window", "stored", "T"),
    *("smallest gap", "weakest mistake", "KiB"),
)

README = """# Goldens

Random checkpoints of each model family, and what transformers {transformers} with torch {torch} (safetensors
{safetensors}, numpy {numpy}) computes with them in float32. `python tools/golden.py` writes all of it, in an
environment that its docstring describes; nothing here is edited by hand.

Each directory is a checkpoint as `save_pretrained` leaves it, and

- `config.classic.json`: the same model in the spelling of transformers 4 (`rope_theta`, `rope_scaling`,
  `torch_dtype`; keys that older configs lack are left out). It gives the same logits, bit for bit.
- `golden.npz`: `tokens` int32 [{prompts}, T]; `logits` float32 [{prompts}, T, V], at every position of every prompt;
  `greedy` int32 [{prompts}, {greedy}], the continuation of each whole prompt; `greedy_logprobs` and `greedy_gaps`
  (top-1 minus top-2 logit) of the same shape. Prompts and continuations hold no end-of-sequence id. The logits of a
  shorter prompt are the beginning of a row.

`llama_bias` has biases on all seven projections, `qwen2*` on q, k and v, `qwen3_f16` on q, k, v and o. `qwen3` is
sharded. `linear` spells `type` for `rope_type` in its classic config; the classic config of `qwen2` has a window that
is not to be used; the `layer_types` of `qwen3_f16` overrule its `max_window_layers`. `gemma2` caps scores and
logits, `gemma3_untied` logits; `gemma3` has one global layer, the sixth, whose rope alone is stretched. `phi3` rotates
three quarters of a head and is stretched by its short list, `phi3_long` by its long one: its prompts are longer than
the original context, and for shorter ones transformers takes the other list. `granite` has biases on all seven
projections; the third layer of `smollm3` has no rope. `mixtral` has 5 experts, of which a token goes through 2;
`qwen3_moe` 8 and 3, and none in its second layer; `qwen3_moe_step` 6 and 2 in its second layer only, and does not
normalise their weights. `deepseek_v2` projects queries by a rank and chooses 3 of 8 experts within 2 of 4 groups,
`deepseek_v2_lite` does neither; both have shared experts, and none in their first layer.

The weakest mistake is the wrong model that comes closest: the largest difference that it makes to any logit. Float32
rounding is below 1e-4.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens"
    parser.add_argument("--out", type=Path, default=default, help="directory to write (default: tests/goldens)")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # one order of summation, so that a second run writes the same bytes
    transformers.utils.logging.disable_progress_bar()

    rows = []
    for golden in GOLDENS:
        rows.append(make(golden, out / golden.name))
        print(rows[-1], flush=True)
    table = "\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *rows])
    versions = {module.__name__: module.__version__ for module in (transformers, torch, safetensors, np)}
    readme = README.format(**versions, prompts=PROMPTS, greedy=GREEDY_TOKENS, table=table)
    (out / "README.md").write_text(readme)


if __name__ == "__main__":
    main()
