"""Writes tests/goldens/gguf_blocks: what llama.cpp computes with models of random blocks, one for each format.

python tools/golden_gguf.py [--folder FOLDER]

The models are tests/gguf_blocks.py's, made again wherever they are needed: only their hashes are kept. Each prompt has
two sets of log-probabilities of the next token, over the whole vocabulary. `logprobs` are llama.cpp's from the
quantised file: for its products it rounds activations to 8 bits, so these are no exact target. `exact` are from the
same weights as float32, which llama-quantize made of the file: what a computation in float32 must give, to 1e-4.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
from llamacpp import build, default_folder, free_port, running, server_argv, version

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from gguf_blocks import TYPES, VOCAB, write_random_model  # noqa: E402

PROMPT_LENGTHS = (1, 7, 40)


def prompts() -> list[list[int]]:
    """Token ids that are no specials, after the first, which begins a text."""
    rng = np.random.default_rng(7)
    return [[1, *(int(t) for t in rng.integers(3, VOCAB, n - 1))] for n in PROMPT_LENGTHS]


async def next_logprobs(programs: Path, model: Path) -> np.ndarray:
    """float64 [prompts, vocabulary] of llama-server, whose cache is float32 here."""
    port = free_port()
    options = ["-t", 2, "-c", 512, "-np", 1, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"]
    found = np.full((len(PROMPT_LENGTHS), VOCAB), np.nan)
    async with running(server_argv(programs, model, port, *options), port) as server, httpx.AsyncClient() as client:
        for _ in range(600):
            try:
                if (await client.get(f"{server.url}/health")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
        for row, prompt in zip(found, prompts(), strict=True):
            # Probabilities are from before the bias, which chooses a whole character: of a part of one it says nothing.
            whole = [[VOCAB - 1, 1000.0]]
            body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": VOCAB, "logit_bias": whole}
            answer = await client.post(f"{server.url}/completion", json=body, timeout=60)
            (token,) = answer.raise_for_status().json()["completion_probabilities"]
            for candidate in token["top_logprobs"]:
                row[candidate["id"]] = candidate["logprob"]
    if not np.isfinite(found).all():
        raise SystemExit(f"{model.name}: llama-server gave no log-probability of {np.isnan(found).sum()} tokens")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default_folder(), help="for llama.cpp: %(default)s")
    parser.add_argument("--types", default=",".join(TYPES), help="only these, which are printed and not written")
    args = parser.parse_args()
    programs = build(args.folder)
    goldens = ROOT / "tests" / "goldens" / "gguf_blocks"
    goldens.mkdir(exist_ok=True)
    print(f"{'type':8} {'largest difference of 8 bit activations':>40} {'largest logprob':>16}")
    for name in args.types.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            model, dense = Path(scratch, f"{name}.gguf"), Path(scratch, "F32.gguf")
            digest = write_random_model(model, name)
            command = [str(a) for a in (programs / "llama-quantize", "--allow-requantize", model, dense, "F32")]
            subprocess.run(command, check=True, capture_output=True)
            found, exact = (asyncio.run(next_logprobs(programs, path)) for path in (model, dense))
        print(f"{name:8} {np.abs(found - exact).max():40.4f} {exact.max():16.4f}", flush=True)
        if args.types != parser.get_default("types"):
            continue
        golden = {"type": name, "tensors_sha256": digest, "llama_cpp": version(programs), "prompts": prompts()}
        rows = {key: [[round(p, 5) for p in row] for row in a.tolist()] for key, a in
                (("logprobs", found), ("exact", exact))}  # fmt: skip
        (goldens / f"{name}.json").write_text(json.dumps(golden | rows) + "\n")


if __name__ == "__main__":
    main()
