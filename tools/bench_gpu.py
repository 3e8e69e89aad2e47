"""Measures jaxserve on one GPU, from its attention kernel to its server, and holds the figures to targets.

    python tools/bench_gpu.py                                # Llama 3.1 8B; the targets are for one H200
    python tools/bench_gpu.py --model qwen3-0.6b --json out.json
    python tools/bench_gpu.py sanitize                       # the kernel under NVIDIA's compute-sanitizer
    python tools/bench_gpu.py --dry-run                      # the whole script on CPU, with a tiny model

Weights are random bfloat16, drawn on the device and kept in --folder (16 GB for Llama 3.1 8B). Each part is a process
of its own, since each takes the GPU's memory: `kernels` (parity with float32, bandwidth, attention over KV caches of 16
and of 8 bits, and over DeepSeek's latents), `products` (of experts and of quantised matrices, in gpu_products.py),
`steps` (draws weights; compiled steps, queued so that the device never waits), `serve` (`jaxserve serve` under load,
over HTTP). A host gap is the share of a served decode step that the queued step does not take.
"""

import argparse
import asyncio
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from gates_attention import Heads  # noqa: E402
from gpu_figures import DRY, REAL, REPEATS, Figure, Scale, check_device, fastest  # noqa: E402
from gpu_products import products  # noqa: E402

MODELS = ("llama-3.1-8b", "qwen3-0.6b")
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["all", *PARTS, "sanitize"], default="all")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--folder", type=Path, help="where the drawn weights are kept; default: a temporary one")
    parser.add_argument("--json", type=Path, help="the figures go there, too")
    parser.add_argument("--tool", choices=["memcheck", "racecheck", "synccheck", "initcheck"], default="memcheck")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on CPU; its figures mean nothing")
    options = parser.parse_args(arguments)
    from jaxserve.gpu_memory import pool_variables

    scale = DRY if options.dry_run else REAL
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {'' if scale.dry else COMMAND_BUFFERS}".strip()
    os.environ.update(pool_variables())  # as a server's engine has it
    if scale.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if options.part == "sanitize":
        return sanitize(options.tool)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / ("tiny" if scale.dry else options.model)
        if options.part != "all":
            figures = PARTS[options.part](scale, options.model, folder)
        else:
            figures = everything(options, folder)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")
    if options.part == "all":
        print(f"\n{'DRY RUN ON CPU: no figure means anything' if scale.dry else device_line()}")
    print("\n".join(f.line() for f in figures))
    return 0


def everything(options: argparse.Namespace, folder: Path) -> list[Figure]:
    """Each part in a process of its own, and what follows from two of them."""
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as results:
        for part in PARTS:
            out = Path(results) / part
            command = [
                sys.executable,
                __file__,
                part,
                "--model",
                options.model,
                "--folder",
                folder.parent,
                "--json",
                out,
            ]
            print(f"== {part}", file=sys.stderr, flush=True)
            done = subprocess.run([*command, *(["--dry-run"] if options.dry_run else [])], stdout=sys.stderr)
            if done.returncode:
                raise SystemExit(f"{part} failed")
            found += [Figure(**figure) for figure in json.loads(out.read_text())]
    return [*found, *derived({f.name: f.value for f in found})]


def derived(figures: dict[str, float]) -> Iterator[Figure]:
    """What the targets are about."""
    gap = re.compile(r"serve, (\d+) users?: ITL, median")
    for name, itl in figures.items():
        if (users := gap.fullmatch(name)) and (step := figures.get(f"step, {users[1]} decoding: time")):
            yield Figure(f"host gap, {users[1]} users", 100 * max(0.0, 1 - step / itl), "%", "< 5")
    read = figures["bytes read for a token of 1 user"]
    alone = figures["serve, 1 user: output"] * read / 1e9
    yield Figure("serve, 1 user: weights and KV of bandwidth", 100 * alone / figures["copy bandwidth"], "%", "> 85")
    rate = figures["serve, prompts: input"] * figures["operations of a token"] / 1e12
    yield Figure("serve, prompts: of the peak", 100 * rate / figures["matrix product peak"], "%", "> 60")


def device_line() -> str:
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"],
        capture_output=True, text=True,
    )  # fmt: skip
    from importlib.metadata import version

    return f"{done.stdout.strip() or 'unknown GPU'}; jax {version('jax')}"


KINDS = ("the queries' type", "int8", "float8_e4m3fn")
"""What the KV cache keeps numbers as."""


def kernels(scale: Scale, model: str, folder: Path) -> list[Figure]:
    import jax
    import jax.numpy as jnp

    check_device(scale)
    n, m = scale.copy_bytes // 2, scale.matrix
    x = jnp.zeros(n, jnp.bfloat16)
    copying = jax.jit(lambda x: jax.lax.fori_loop(0, REPEATS, lambda _, x: -x, x), donate_argnums=0)
    best = math.inf
    for _ in range(scale.rounds):
        start = time.perf_counter()
        x = jax.block_until_ready(copying(x))
        best = min(best, time.perf_counter() - start)
    bandwidth = REPEATS * 2 * x.nbytes / best / 1e9
    del x
    a = jax.random.normal(jax.random.key(0), (m, m), jnp.bfloat16) / m**0.5
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, REPEATS, lambda _, b: a @ b, b))
    peak = REPEATS * 2 * m**3 / fastest(partial(product, a, a), scale.rounds) / 1e12
    figures = [
        Figure("copy bandwidth", bandwidth, "GB/s"),
        Figure("matrix product peak", peak, "TFLOP/s"),
    ]
    config = config_of(scale, model)
    own = Heads(config.heads, config.kv_heads, config.head_dim)
    measured = []
    for kind in KINDS:
        of = "attention" if kind == KINDS[0] else f"attention of {kind}"
        measured.append((of, own, kind))
        figures.append(Figure(f"{of}: largest error against float32", parity(scale, kind), "of 1"))
    measured += [(f"attention of {name}'s latents", heads, KINDS[0]) for name, heads in latents(scale).items()]
    for of, heads, kind in measured:
        for seqs, context in scale.attention:
            read, seconds = attention_time(scale, heads, seqs, context, kind)
            share = 100 * read / seconds / 1e9 / bandwidth
            name = f"{of}, {seqs} x {context}"
            figures.append(Figure(f"{name}: time", 1e6 * seconds, "us"))
            target = "> 80" if of == "attention" else ""
            figures.append(Figure(f"{name}: keys and values of bandwidth", share, "%", target))
    return figures


def latents(scale: Scale) -> dict[str, Heads]:
    """Attention over latents, by the model that has it."""
    if scale.dry:
        return {"a tiny model": Heads(4, 1, 24, values=16)}
    return {"DeepSeek-V2-Lite": Heads(16, 1, 576, values=512), "DeepSeek-V2": Heads(128, 1, 576, values=512)}


def _kernel(scale: Scale) -> Any:
    from kernels_pallas.ragged_paged_attention.gpu import ragged_paged_attention

    return partial(ragged_paged_attention, interpret=True) if scale.dry else ragged_paged_attention


def cache_of(rows: Any, kind: str, kv_heads: int) -> Any:
    """Rows [P, page, K*2*H] as a cache of that kind; what is NaN has NaN for a scale in an Int8Cache."""
    from kernels_pallas.ragged_paged_attention.contract import Int8Cache, narrowed, quantised

    if kind == KINDS[0]:
        return rows
    if kind != "int8":
        return narrowed(rows, kind)
    values, scales = quantised(rows.reshape(*rows.shape[:2], kv_heads * 2, -1))
    return Int8Cache(values.reshape(rows.shape), scales.transpose(0, 2, 1))


def parity(scale: Scale, kind: str) -> float:
    """The largest difference to the reference with queries in float32, of random ragged batches of several shapes; what
    no one has written is NaN."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kernels_pallas.ragged_paged_attention.reference import ragged_paged_attention as reference

    worst, dtype, rng = 0.0, jnp.float32 if scale.dry else jnp.bfloat16, np.random.default_rng(0)
    shapes = [(4, 2, 16, 16)] if scale.dry else [(32, 8, 128, 64), (16, 8, 128, 16), (12, 1, 96, 128), (8, 4, 256, 64)]
    tried = [(Heads(*shape), page) for *shape, page in shapes]
    if kind != "int8":  # which latents are not kept in
        tried += [(heads, 64) for heads in latents(scale).values()]
    cases: list[dict[str, Any]] = [{}, dict(window=100), dict(soft_cap=20.0), dict(sinks=True)]
    for of, page in tried:
        heads, kv_heads, head_dim = of.query, of.kv, of.dim
        for case in cases[: 1 if scale.dry else 4]:
            q_lens = [1, 1, 1, 9, 40]
            pasts = [0, 70, 300, 5, 200] if scale.dry else [0, 700, 8000, 5, 1000]
            lens, tokens = np.add(q_lens, pasts), sum(q_lens) + 3
            width = -(-int(lens.max()) // page)
            table = rng.permutation(len(lens) * width).reshape(len(lens), width).astype(np.int32)
            cache = np.full((table.size, page, row_of(of)), np.nan, np.float32)
            for s, past in enumerate(pasts):
                for i in range(-(-past // page)):
                    rows = min(page, past - i * page)
                    cache[table[s, i], :rows] = rng.normal(size=(rows, cache.shape[2]))
            new = [jnp.asarray(rng.normal(size=(tokens, h, head_dim)), dtype) for h in (heads, kv_heads, kv_heads)]
            if of.values is not None:
                new[2], cache[..., head_dim:] = None, 0.0
            cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
            rest = (lens.astype(np.int32), table, cu, np.array([3, 3, 5], np.int32))
            given = dict(case, scale=head_dim**-0.5, value_dim=of.values)
            if case.get("sinks"):
                given["sinks"] = jnp.linspace(-2.0, 3.0, heads)
            rows = jnp.asarray(cache, dtype)
            out = jax.jit(partial(_kernel(scale), **given))(*new, cache_of(rows, kind, kv_heads), *rest)[0]
            wide = [None if a is None else a.astype(jnp.float32) for a in new]
            same = cache_of(rows.astype(jnp.float32), kind, kv_heads)
            want = jax.jit(partial(reference, **given))(*wide, same, *rest)[0]
            difference = float(jnp.abs(out.astype(jnp.float32) - want)[: cu[-1]].max())
            if not difference < (1e-4 if scale.dry else 3e-2):
                raise SystemExit(
                    f"{heads} / {kv_heads} heads of {head_dim}, pages of {page}, a cache of {kind}, {case}: "
                    f"off by {difference}"
                )
            worst = max(worst, difference)
    return worst


def row_of(heads: Heads) -> int:
    """Numbers of a row of the cache."""
    from kernels_pallas.ragged_paged_attention.contract import latent_row

    return heads.kv * 2 * heads.dim if heads.values is None else latent_row(heads.dim)


def attention_time(scale: Scale, heads: Heads, seqs: int, context: int, kind: str) -> tuple[float, float]:
    """Bytes of keys and values that a decode step of attention reads, scales among them, and its seconds."""
    import jax
    import jax.numpy as jnp

    page, dtype = 64, jnp.float32 if scale.dry else jnp.bfloat16
    width = -(-context // page)
    row = row_of(heads)
    cache = cache_of(jnp.zeros((seqs * width, page, row), dtype), kind, heads.kv)
    q = jnp.zeros((seqs, heads.query, heads.dim), dtype)
    k = jnp.zeros((seqs, heads.kv, heads.dim), dtype)
    v = k if heads.values is None else None
    table = jnp.arange(seqs * width, dtype=jnp.int32).reshape(seqs, width)
    lens, cu = jnp.full(seqs, context, jnp.int32), jnp.arange(seqs + 1, dtype=jnp.int32)
    every = jnp.full(3, seqs, jnp.int32)
    kernel = partial(_kernel(scale), scale=0.1, value_dim=heads.values)

    def steps(q: Any, cache: Any) -> Any:
        def one(_: Any, carry: Any) -> Any:
            out, cache = kernel(carry[0], k, v, carry[1], lens, table, cu, every)
            # The next step waits for this one, by a number of it: results of latents are narrower than queries.
            return jax.lax.dynamic_update_slice(carry[0], out[:1, :1, :1], (0, 0, 0)), cache

        return jax.lax.fori_loop(0, REPEATS, one, (q, cache))

    run = jax.jit(steps)
    seconds = fastest(lambda: run(q, cache), scale.rounds) / REPEATS
    kept = sum(a.nbytes for a in jax.tree.leaves(cache))
    if heads.values is not None:  # no one reads what fills a row
        kept = kept * heads.dim // row
    return kept * context / (width * page), seconds


def config_of(scale: Scale, model: str) -> Any:
    from jaxserve.models import find_model

    return find_model(_hf(scale, model), None)[1]


def _hf(scale: Scale, model: str) -> dict[str, Any]:
    found: dict[str, Any] = TINY if scale.dry else json.loads((ROOT / "configs/models" / f"{model}.json").read_text())
    return found


def draw(scale: Scale, model: str, folder: Path) -> None:
    """Draws the weights on the device and writes them as a checkpoint, unless they are there."""
    if (folder / "config.json").exists():
        return
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    from jaxserve.dry_run import specs_of
    from jaxserve.hub import resolve_model
    from jaxserve.models import find_model
    from jaxserve.spec import ParamSpec

    hf = _hf(scale, model)
    found, config = find_model(hf, None)
    specs = jax.tree.leaves(specs_of(found, config), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    folder.mkdir(parents=True, exist_ok=True)
    start, tensors = time.perf_counter(), {}
    normal = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    for i, spec in enumerate(specs):
        shape = spec.stored_shape
        if len(shape) == 1:
            tensors[spec.name] = np.asarray(jnp.ones(shape, jnp.bfloat16))
        else:
            tensors[spec.name] = np.asarray(normal(jax.random.key(i), shape) * shape[-1] ** -0.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    embedded = resolve_model(None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder / name)
    (folder / "config.json").write_text(json.dumps(hf))
    size = sum(t.nbytes for t in tensors.values())
    print(f"drew {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def steps(scale: Scale, model: str, folder: Path) -> list[Figure]:
    """Compiled steps, launched one behind the other, so that the device has the next one before it ends one."""
    from jaxserve import profile
    from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, ScheduleOptions
    from jaxserve.metrics import EngineMetrics
    from jaxserve.runner import Runner

    check_device(scale)
    draw(scale, model, folder)
    most = max(scale.users)
    options = EngineOptions(
        model=ModelOptions(max_model_len=_length(scale)),
        schedule=ScheduleOptions(
            max_num_seqs=most, max_num_batched_tokens=max(2048, scale.prompt) if not scale.dry else 64
        ),
        device=DeviceOptions(warmup="lazy", compile_cache_dir=""),
    )
    runner = Runner(options, folder, EngineMetrics("bench"), lambda text: print(text, file=sys.stderr))
    figures = []
    for users in scale.users:
        seconds = _queued(runner, profile.Case(users, 1, scale.context + scale.answer // 2), scale.rounds)
        figures.append(Figure(f"step, {users} decoding: time", 1e3 * seconds, "ms"))
    tokens = min(scale.prompt, runner.sizes.max_num_batched_tokens)
    seconds = _queued(runner, profile.Case(1, tokens, 0), scale.rounds)
    figures.append(Figure(f"step, a prompt of {tokens}: tokens", tokens / seconds, "1/s"))
    weights, config = profile.weights_read(runner.params), runner.config
    kv = config.layers * config.kv_heads * 2 * config.head_dim * runner.programs.dtype.itemsize
    context = scale.context + scale.answer / 2
    figures.append(Figure("bytes read for a token of 1 user", weights + kv * context, "bytes"))
    # Of a prompt's token: all matrices but the logits', and its attention to half of the prompt.
    logits = config.vocab * config.width
    products = sum(a.size for a in _leaves(runner.params)) - logits * (1 if config.tied else 2)
    scores = config.layers * config.heads * config.head_dim * scale.prompt
    figures.append(Figure("operations of a token", 2.0 * products + 2.0 * scores, "flop"))
    return figures


def _leaves(params: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(params)


def _queued(runner: Any, case: Any, rounds: int) -> float:
    """Seconds of a step among `rounds` that are launched without waiting for one."""
    plan = case.plan(runner)
    runner.launch(plan)[0].result()
    plan.admitted.clear()
    runner.launch(plan)[0].result()
    start = time.perf_counter()
    for _ in range(rounds):
        last = runner.launch(plan)[0]
    last.result()
    return (time.perf_counter() - start) / rounds


def _length(scale: Scale) -> int:
    return max(scale.context + scale.answer, scale.prompt + 1) + 64


def serve(scale: Scale, model: str, folder: Path) -> list[Figure]:
    """`jaxserve serve` in processes of its own, asked over HTTP."""
    if not (folder / "config.json").exists():
        raise SystemExit(f"no weights in {folder}; `steps` draws them, with the same --folder")
    return asyncio.run(_loads(scale, model, folder))


async def _loads(scale: Scale, model: str, folder: Path) -> list[Figure]:
    import numpy as np

    from jaxserve import bench

    vocab = _hf(scale, model)["vocab_size"]
    figures = []
    with _server(scale, folder) as url:
        async with bench.HttpTarget(url) as target:
            for seed, users in enumerate(scale.users):
                work = bench.Workload(
                    input_len=scale.context, output_len=scale.answer, num_prompts=users * (1 if scale.dry else 3),
                    vocab_size=vocab, seed=2 * seed,
                )  # fmt: skip
                warm = bench.Workload(
                    input_len=scale.context, output_len=4, num_prompts=users, vocab_size=vocab, seed=2 * seed + 1
                )
                await bench.measure(target.send, warm.samples(), concurrency=users)
                report = await bench.measure(target.send, work.samples(), concurrency=users)
                if errors := report.errors():
                    raise SystemExit(f"{users} users: {errors}")
                name = f"serve, {users} user{'s' if users > 1 else ''}"
                gaps = np.array([gap for o in report.done for gap in o.itl_s])
                first = np.array([o.ttft_s for o in report.done])
                decoding = sum(o.tokens - 1 for o in report.done) / sum(o.latency_s - o.ttft_s for o in report.done)
                rate = decoding if users == 1 else report.output_throughput  # alone, prompts do not count
                figures += [
                    Figure(f"{name}: output", rate, "tok/s"),
                    Figure(f"{name}: TTFT, median", 1e3 * float(np.median(first)), "ms"),
                    Figure(f"{name}: ITL, median", 1e3 * float(np.median(gaps)), "ms"),
                    Figure(f"{name}: ITL, 99th percentile", 1e3 * float(np.percentile(gaps, 99)), "ms"),
                ]
            prompts = bench.Workload(
                input_len=scale.prompt, output_len=1, num_prompts=2 if scale.dry else 64, vocab_size=vocab, seed=99
            )
            report = await bench.measure(target.send, prompts.samples(), concurrency=8)
            rate = sum(o.prompt_tokens for o in report.done) / report.duration_s
            figures.append(Figure("serve, prompts: input", rate, "tok/s"))
    return figures


@contextmanager
def _server(scale: Scale, folder: Path) -> Iterator[str]:
    """Its address, once it answers."""
    flags = {
        "max-num-seqs": max(scale.users), "max-model-len": _length(scale), "warmup": "lazy" if scale.dry else "full",
        "max-num-batched-tokens": 64 if scale.dry else max(2048, scale.prompt), "port": 0, "grpc-port": -1,
    }  # fmt: skip
    command = [sys.executable, "-m", "jaxserve", "serve", str(folder)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    try:
        url, said = None, ""
        for line in process.stdout:
            said += line
            if found := re.match(r"\s+HTTP\s+(\S+)", line):
                url = found[1]
            if line.startswith("  curl"):
                break
        if url is None:
            raise SystemExit(f"the server did not start:\n{said}")
        print(said, file=sys.stderr)
        drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    drain.wait(10)


def sanitize(tool: str) -> int:
    """Runs the parity check under NVIDIA's compute-sanitizer; its exit code."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise SystemExit("compute-sanitizer is not on the PATH; it is part of the CUDA toolkit")
    check = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tools')!r}]; import bench_gpu as b; "
    check += "b.check_device(b.REAL); print('largest errors', [b.parity(b.REAL, kind) for kind in b.KINDS])"
    flags = ["--error-exitcode", "1", "--tool", tool, "--kernel-name", "regex=jaxserve_attention"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.run([program, *flags, sys.executable, "-c", check], env=environment).returncode


PARTS = {"kernels": kernels, "products": products, "steps": steps, "serve": serve}

if __name__ == "__main__":
    sys.exit(main())
