"""Writes tests/goldens/examples: random checkpoints for the models in examples/, as golden.py does for the others.

Run in the environment that golden.py describes:

    ORACLE/bin/python tools/golden_examples.py
"""

import argparse
import shutil
from pathlib import Path

import golden
import numpy as np
import torch
import transformers
from golden_models import Golden
from safetensors.numpy import load_file, save_file

SMALL = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2}

GOLDENS = [
    Golden(
        "gpt_neox",
        "gpt_neox",
        seed=14,
        prompt_tokens=40,
        config={"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, **SMALL}
        | {"rotary_pct": 0.5, "rotary_emb_base": 500.0, "layer_norm_eps": 1e-3, "max_position_embeddings": 256},
        mistakes={
            "rotates all": {"rotary_pct": 1.0},
            "theta": {"rotary_emb_base": 10000.0},
            "one after the other": {"use_parallel_residual": False},
            "gelu": {"hidden_act": "silu"},
            "eps": {"layer_norm_eps": 1e-5},
        },
    ),
    Golden(
        "gpt2",
        "gpt2",
        seed=15,
        prompt_tokens=40,
        config={"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "layer_norm_epsilon": 1e-3, **SMALL},
        mistakes={"gelu": {"activation_function": "silu"}, "eps": {"layer_norm_epsilon": 1e-5}},
    ),
]
PREFIXES = {"gpt2": "transformer."}
"""Of the tensors' names as save_pretrained writes them, and as the published checkpoint does not have them."""


def randomise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """As golden.randomise, for norms that have biases and are called ln."""
    for name, weight in sorted(model.named_parameters()):
        if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
            values = rng.uniform(0.5, 1.5, weight.shape)
        else:
            values = rng.normal(0.0, 0.2 if weight.ndim == 2 else 0.3, weight.shape)
        weight.data.copy_(torch.from_numpy(values.astype(np.float32)))


def write_checkpoint(one: Golden, directory: Path, rng: np.random.Generator) -> None:
    model = transformers.AutoModelForCausalLM.from_config(golden.config_of(one), dtype=torch.float32)
    randomise(model, rng)
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    model.save_pretrained(directory)


def make(one: Golden, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    rng = np.random.default_rng(one.seed)
    write_checkpoint(one, directory, rng)
    if prefix := PREFIXES.get(one.name):
        tensors = load_file(directory / "model.safetensors")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model = golden.load(directory)
    tokens = golden.choose_prompts(one, model, rng)
    right = golden.logits(model, tokens)
    greedy, _, _ = golden.continue_greedily(model, tokens, golden.GREEDY_TOKENS)
    moved = golden.effects(one, directory, tokens, right)
    np.savez_compressed(directory / "golden.npz", tokens=tokens, logits=right, greedy=greedy)
    weakest = min(moved, key=moved.get)
    print(f"{one.name}: the weakest mistake moves a logit by {moved[weakest]:.2f} ({weakest})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "examples"
    parser.add_argument("--out", type=Path, default=default, help="directory to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for one in GOLDENS:
        make(one, out / one.name)


if __name__ == "__main__":
    main()
