"""Plans: what they work out by hand-checked arithmetic, what they refuse, and on CPU that a start comes to the same."""

import importlib.util
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from gguf_files import LAYERS, WIDTH, write_model

from jaxserve import cli
from jaxserve.cli import options
from jaxserve.cli.plan import lines, table
from jaxserve.config import DeviceOptions, EngineOptions, ModelOptions, ScheduleOptions, engine_options_of
from jaxserve.errors import ConfigError, NoRoom
from jaxserve.metrics import EngineMetrics
from jaxserve.planning import planner, topology
from jaxserve.planning.chips import CHIPS
from jaxserve.planning.planner import plan, sketched
from jaxserve.planning.steps import Step, collectives
from jaxserve.planning.topology import Topology
from jaxserve.runner import Runner
from jaxserve.weights import open_config

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "configs" / "models"
GOLDENS = Path(__file__).parent / "goldens"
LLAMA_8B = MODELS / "llama-3.1-8b.json"
LLAMA_70B = MODELS / "llama-3.3-70b.json"
GIB = 2**30
PARAMS_8B = 8_030_261_248
"""As its model card counts them."""
NORMS_8B = (2 * 32 + 1) * 4096
EMBED_8B = 128256 * 4096


def made_up(workspace=GIB // 2, code=0, padding=0):
    """A compiler that finds every step alike."""

    def compile_one(programs, shape, sizes):
        return Step(
            tokens=shape.tokens, seqs=shape.seqs, seconds=1.0, arguments=padding, updated=0, workspace=workspace,
            code=code, flops=None, bytes_accessed=None, collectives=(),
        )  # fmt: skip

    return compile_one


def planned(path, where, mesh, compile_one=None, context=1024, **given):
    engine = engine_options_of(str(path), {"mesh": mesh, **given})
    return plan(
        engine, path, Topology.parse(where), mesh=lambda _, shape: sketched(shape), context=context,
        compile_one=compile_one or made_up(),
    )  # fmt: skip


# --- topologies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "hosts"),
    [("v5e:1x1", 1, 1), ("v5e:2x4", 8, 1), ("v6e:4x4", 16, 4), ("v5p:2x2x1", 4, 1), ("v5p:2x2x2", 8, 2),
     ("h100:8", 8, 1), ("a100:1", 1, 1), ("cpu:8", 8, 1)],
)  # fmt: skip
def test_a_topology_is_read_and_said(text, count, hosts):
    found = Topology.parse(text)
    assert (str(found), found.count, found.hosts) == (text, count, hosts)


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e:", "v5e:3x3", "v5e:2x2x2", "v5p:2x4", "v9:2x2", "h100:3", "cpu:0", "cpu:x"]
)
def test_an_unknown_topology_is_refused_with_those_that_are_known(text):
    with pytest.raises(
        ConfigError, match=r"is not known; known are v5e, v6e with :1x1, .*:2x4.*; v5p with .*h100.*cpu:8"
    ):
        Topology.parse(text)


def test_chips_have_the_figures_of_their_makers():
    assert all(chip.source.startswith("https://") and chip.bandwidth and chip.bf16 for chip in CHIPS.values())
    h100 = CHIPS["h100"]
    assert (h100.bandwidth, h100.bf16, h100.float32, h100.int8) == (3.35e12, 989e12, 494.5e12, 1978e12)
    assert CHIPS["v5e"].memory < 16 * GIB < CHIPS["v6e"].memory < 32 * GIB < CHIPS["v5p"].memory < 96 * GIB


@pytest.mark.parametrize(
    ("where", "said"),
    [("v5e:2x4", r"needs the TPU's compiler.*pip install 'jaxserve\[tpu\]'"),
     ("h100:8", r"needs JAX's plugin for CUDA.*pip install --no-deps jax-cuda13-plugin==")],
)  # fmt: skip
def test_a_missing_compiler_is_told_before_anything_else(monkeypatch, capsys, where, said):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        Topology.parse(where).devices()
    assert cli.call(["plan", "/no/such/model", "--topology", where]) == cli.USAGE
    assert "pip install" in capsys.readouterr().err


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_what_it_is_by_hand():
    found = planned(LLAMA_8B, "v5e:2x4", "2x4", max_model_len=16384, max_num_seqs=128)
    weights = 2 * ((PARAMS_8B - NORMS_8B) // 4 + NORMS_8B)
    assert found.num_params == PARAMS_8B and found.device_bytes["weights"] == weights
    page = 32 * 64 * 2 * 2 * 128 * 2  # layers, tokens, kv heads of a device, k and v, head_dim, bytes
    usable = int(0.9 * int(15.75 * GIB))
    slots = found.device_bytes["slots"]
    assert 129 * 16384 * 4 < slots < 129 * 19000 * 4, "the tokens of every slot, and little else"
    assert found.kv_pages == (usable - weights - slots - GIB // 2) // page
    assert found.device_bytes["kv"] == found.kv_pages * page
    assert found.fits and found.problem is None and found.usable == usable
    assert found.kv_tokens == found.kv_pages * 64 and found.max_model_len == 16384
    assert (found.devices, found.hosts, found.mesh) == (8, 1, "2x4") and found.attention == "tpu"


def test_what_does_not_fit_is_told_with_the_smallest_change():
    found = planned(LLAMA_70B, "v5e:2x4", "1x8")
    assert not found.fits and not found.steps and found.decode == () and found.kv_pages is None
    assert found.problem.startswith("weights of 16.43 GiB leave no room for the KV cache: 90% of 15.75 GiB may be used")
    assert found.cure == "--topology v5e:4x4 --mesh 1x16"
    assert "DOES NOT FIT: weights of 16.43 GiB" in "\n".join(lines(found))
    assert "would with --topology v5e:4x4" in "\n".join(table([found]))


@pytest.mark.parametrize(
    ("path", "where", "mesh", "given", "cure"),
    [
        (LLAMA_8B, "v5e:2x4", "8x1", {}, "--mesh 4x2"),
        (LLAMA_70B, "v6e:2x4", "2x4", {}, "--mesh 1x8"),
        (LLAMA_8B, "v6e:1x1", "1", {"memory_utilization": 0.4}, "--memory-utilization 0.95"),
        (LLAMA_8B, "v5e:2x2", "1x2", {"max_model_len": 131072}, "--max-model-len "),
        (LLAMA_70B, "h100:1", "1", {}, "--topology h100:4 --mesh 1x4"),
    ],
)
def test_smaller_changes_come_first(path, where, mesh, given, cure):
    found = planned(path, where, mesh, **given)
    assert not found.fits and found.cure.startswith(cure)


def test_the_advised_context_is_the_longest_that_fits():
    def with_context(length):
        return planned(LLAMA_8B, "v5e:2x2", "1x2", made_up(workspace=GIB), max_model_len=length, max_num_seqs=8)

    length = int(with_context(131072).cure.removeprefix("--max-model-len "))
    assert with_context(length).fits and not with_context(length + 256).fits


def test_a_step_that_does_not_compile_for_lack_of_memory_is_no_crash():
    def too_large(programs, shape, sizes):
        raise NoRoom("Ran out of memory on HBM")

    found = planned(LLAMA_8B, "v5e:2x4", "1x8", too_large)
    assert not found.fits and "Ran out of memory" in found.problem


def test_code_and_padding_count_too():
    found = planned(LLAMA_8B, "v5e:2x4", "1x8", made_up(code=GIB // 4))
    assert not found.fits and "the code of 10 steps come on top" in found.problem
    name, pages = found.cure.split()
    assert name == "--num-kv-pages"
    given = {"num_kv_pages": int(pages)}
    assert planned(LLAMA_8B, "v5e:2x4", "1x8", made_up(code=GIB // 4), **given).fits
    assert not planned(LLAMA_8B, "v5e:2x4", "1x8", made_up(code=GIB // 4), num_kv_pages=int(pages) + 1).fits
    found = planned(LLAMA_8B, "v5e:2x4", "1x8", made_up(padding=15 * GIB))
    assert found.device_bytes["padding"] == 15 * GIB - sum(found.device_bytes[k] for k in ("weights", "kv", "slots"))


def test_quantised_weights_are_counted_as_they_are_kept(tmp_path):
    found = planned(LLAMA_8B, "v5e:1x1", "1x1", quantization="q4_0", max_model_len=8192)
    matrices, vocabulary = PARAMS_8B - NORMS_8B - 2 * EMBED_8B, 2 * EMBED_8B
    scales = (matrices + vocabulary) // 32 * 4
    weights = matrices // 2 + vocabulary + scales + 2 * NORMS_8B
    assert found.device_bytes["weights"] == weights and found.fits, "16 GB in bfloat16 would not"
    assert found.decode[0].bytes == weights - EMBED_8B * 9 // 8 + 1024 * 32 * 2 * 8 * 128 * 2
    divided = planned(LLAMA_8B, "v5e:2x4", "1x8", quantization="q4_0", max_model_len=8192)
    assert divided.device_bytes["weights"] == (weights - 2 * NORMS_8B) // 8 + 2 * NORMS_8B
    path = write_model(tmp_path / "m.gguf", kind="Q8_0")
    plain = planned(write_model(tmp_path / "plain.gguf"), "v5e:1x1", "1x1").device_bytes["weights"]
    norms = 2 * (2 * LAYERS + 1) * WIDTH
    assert planned(path, "v5e:1x1", "1x1").device_bytes["weights"] - norms == (plain - norms) // 2 * 9 // 8


def test_quantised_experts_are_counted_as_they_are_kept():
    """Qwen3 30B A3B on one chip of 16 GiB's memory would be 57 GiB in bfloat16."""
    found = planned(MODELS / "qwen3-30b-a3b.json", "v6e:1x1", "1x1", quantization="q4_k", max_model_len=8192)
    experts, attention = 48 * 128 * 3 * 768 * 2048, 48 * 2048 * 128 * (2 * 32 + 2 * 4)
    plain = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048  # routers and norms
    vocabulary = 2 * 151936 * 2048
    # 4 bits, and two numbers of float32 for each 32; the vocabulary's 8 bits and one.
    weights = (experts + attention) * 3 // 4 + vocabulary * 9 // 8 + 2 * plain
    assert found.device_bytes["weights"] == weights and found.fits
    assert found.decode[0].bytes == weights - vocabulary * 9 // 16 - experts * 3 // 4 * 120 // 128 + 1024 * 48 * 2048
    divided = planned(
        MODELS / "qwen3-30b-a3b.json", "v6e:2x2", "expert=4", quantization="q4_k", max_model_len=8192
    ).device_bytes["weights"]
    shared = 2 * (plain - 48 * 128 * 2048)
    assert divided == (weights - shared) // 4 + shared
    # Of 192 features a device 256 places are kept where they are outputs, and of 6 groups 8.
    cut = planned(
        MODELS / "qwen3-30b-a3b.json", "v6e:2x2", "model=4", quantization="q4_k", max_model_len=8192
    ).device_bytes["weights"]
    more = experts // 3 * 2 * 3 // 4 // 3 + experts // 3 // 4 // 3
    assert cut == (weights - shared + more) // 4 + shared + (2 * 48 * 128 * 2048 * 3 // 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantization": "q5_k"}, "quantization q5_k needs the CPU"),
        ({"max_model_len": 200_000}, "exceeds the model's 131072 positions"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "is less than max_num_seqs"),
        ({"kv_cache_dtype": "float16"}, "with bfloat16 activations needs the CPU's kernels"),
        ({"block_size": 8, "attention": "tpu"}, "pages of 8 tokens of bfloat16 are not whole tiles"),
        ({"attention": "cpu"}, "attention='cpu' does not run on tpu"),
    ],
)
def test_what_a_start_refuses_a_plan_refuses(given, said):
    with pytest.raises(ConfigError, match=said):
        planned(LLAMA_8B, "v5e:2x4", "1x8", **given)


# --- estimates ------------------------------------------------------------------------------------------------------


def test_estimates_are_what_they_are_by_hand():
    found = planned(LLAMA_8B, "v5e:2x4", "2x4", max_model_len=16384, max_num_seqs=128)
    assert [e.users for e in found.decode] == [1, 16, 64, 256]
    one, most = found.decode[0], found.decode[-1]
    read = found.device_bytes["weights"] - 2 * EMBED_8B // 4
    assert one.bytes == read + 1024 * 32 * 2 * 2 * 128 * 2 and one.bound == "bandwidth"
    assert one.tokens_per_second == pytest.approx(819e9 / one.bytes)
    products = 2 * (PARAMS_8B - EMBED_8B - NORMS_8B) / 4
    assert one.flops == pytest.approx(products + 4 * 8 * 128 * 32 * 1025)
    assert most.bytes == read + 128 * 1024 * 32 * 2 * 2 * 128 * 2, "half of the users in each replica"
    assert most.tokens_per_second == pytest.approx(256 / most.seconds)
    prefill = found.prefill
    per_token = products - 2 * EMBED_8B / 4
    assert prefill.context == 2048 and prefill.bound == "compute"
    assert prefill.flops == pytest.approx(
        2048 * per_token + 2 * EMBED_8B / 4 + 4 * 8 * 128 * 32 * (2048 * 2049 // 2), rel=1e-9
    )
    assert prefill.tokens_per_second == pytest.approx(2 * 2048 * 197e12 / prefill.flops)


def test_a_mixture_reads_the_experts_that_are_chosen():
    found = planned(MODELS / "mixtral-8x7b.json", "v6e:2x4", "1x8", max_num_seqs=64)
    experts = 32 * 8 * 3 * 4096 * 14336 * 2 // 8
    other = found.device_bytes["weights"] - experts - 2 * 32000 * 4096 // 8
    one, most = found.decode[0], found.decode[-1]
    kv = 1024 * 32 * 2 * 128 * 2
    assert one.bytes == pytest.approx(other + experts * 2 / 8 + kv)
    assert most.bytes == pytest.approx(other + experts * (1 - 0.75**64) + 64 * kv)


def test_latents_are_read_by_every_device():
    near, far = (planned(MODELS / "deepseek-v2-lite.json", "v5e:2x4", "1x8", context=n) for n in (1024, 2048))
    experts = 26 * 64 * 3 * 2048 * 1408 * 2 // 8
    other = near.device_bytes["weights"] - experts - 2 * 102400 * 2048 // 8
    assert near.decode[0].bytes == pytest.approx(other + experts * 6 / 64 + 1024 * 27 * 640 * 2)
    assert far.decode[0].flops - near.decode[0].flops == pytest.approx(2 * 2 * (576 + 512) * 27 * 1024, rel=1e-6)
    attention = 2048 * 192 * 2 + 16 * 256 * 512 // 8 + 2048 * 576 + 2048 * 128 * 2  # q, a head's kv, kv, o
    experts_of_a_token, vocabulary = 6 * 3 * 2048 * 1408 // 8, 102400 * 2048 // 8
    products = 27 * attention + 3 * 2048 * 10944 // 8 + 26 * (experts_of_a_token + 3 * 2048 * 2816 // 8 + 64 * 2048)
    met = 2 * 2 * (576 + 512) * 27 * 1025
    assert near.decode[0].flops == pytest.approx(2 * (products + vocabulary) + met)


def test_a_window_bounds_what_is_read_and_computed(tmp_path):
    hf = json.loads((MODELS / "mixtral-8x7b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hf | {"sliding_window": 4096}))
    near, far = (planned(path, "v6e:2x4", "1x8", max_num_seqs=8, context=n).decode[0] for n in (4096, 16384))
    assert near.bytes == far.bytes and far.context == 16384
    whole = planned(MODELS / "mixtral-8x7b.json", "v6e:2x4", "1x8", max_num_seqs=8, context=16384).decode[0]
    assert whole.bytes - far.bytes == (16384 - 4096) * 32 * 2 * 128 * 2
    assert whole.flops > far.flops


def test_users_have_no_more_context_than_the_cache_holds():
    found = planned(LLAMA_8B, "v5e:2x4", "1x8", max_num_seqs=128, num_kv_pages=1280, max_model_len=4096)
    assert [e.context for e in found.decode] == [1024, 1024, 1024, 640]


# --- what the compiler says -----------------------------------------------------------------------------------------


def test_messages_are_read_from_a_program():
    hlo = """
  %all-reduce.1 = bf16[64,4096]{1,0:T(8,128)(2,1)} all-reduce(%fusion.2), metadata={op_name="jit(f)/forward/o/dot"}
  %ar-start = f32[64,4096]{1,0} all-reduce-start(%fusion.3), metadata={op_name="jit(f)/forward/down/dot_general"}
  %ar-done = f32[64,4096]{1,0} all-reduce-done(%ar-start), metadata={op_name="jit(f)/forward/down/dot_general"}
  %ag = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%x), metadata={op_name="jit(f)/cond/sample/sort"}
  %all-reduce.4 = bf16[64,4096]{1,0} all-reduce(%y), metadata={op_name="jit(f)/forward/embed/take"}
  %fusion.9 = bf16[64,4096]{1,0} fusion(%all-reduce.1), kind=kLoop, calls=%all-reduce-consumer
"""
    found = {(c.kind, c.part): (c.count, c.bytes) for c in collectives(hlo)}
    assert found == {
        ("all-reduce", "block"): (2, 64 * 4096 * 6),
        ("all-reduce", "embed"): (1, 64 * 4096 * 2),
        ("all-gather", "sample"): (1, 64 * 16 * 2),
    }


def test_a_plan_and_a_start_come_to_the_same():
    """On one CPU, with the compiler that is here; what the plan says of memory is what memory_analysis says."""
    path = GOLDENS / "llama2"
    engine = EngineOptions(
        model=ModelOptions(max_model_len=64),
        schedule=ScheduleOptions(max_num_seqs=4, max_num_batched_tokens=16),
        device=DeviceOptions(block_size=4, num_kv_pages=64, attention="reference", warmup="lazy"),
    )
    found = plan(engine, path, Topology.parse("cpu:1"))
    runner = Runner(engine, path, EngineMetrics("test"), lambda message: None)
    runner.close()
    info = runner.info
    theirs = {kind: found.device_bytes[kind] for kind in ("weights", "kv", "slots")}
    assert theirs == {kind: info.device_bytes[kind] for kind in theirs}
    assert found.steps[0].workspace == info.device_bytes["workspace"]
    assert found.num_params == info.num_params and found.kv_pages == info.num_pages
    assert (found.max_model_len, found.max_num_seqs, found.max_num_batched_tokens) == (64, 4, 16)
    largest, decoding = found.steps
    assert (largest.tokens, largest.seqs, decoding.tokens, decoding.seqs) == (16, 4, 4, 4)
    memory = runner.compiled(max(runner.shapes)).memory_analysis()
    assert largest.arguments == memory.argument_size_in_bytes and largest.updated == memory.alias_size_in_bytes
    assert largest.updated >= found.device_bytes["kv"] + found.device_bytes["slots"]
    assert found.fits and found.decode == () and found.prefill is None, "nobody says how fast this CPU is"


def test_the_command_line_plans_from_a_config_alone(tmp_path, capsys):
    """Also what goes on standard output with --json: the report, and nothing else."""
    (tmp_path / "config.json").write_bytes((GOLDENS / "llama2" / "config.json").read_bytes())
    flags = ["--topology", "cpu:1", "--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--num-kv-pages", "64"]
    assert cli.call(["plan", str(tmp_path), *flags, "--json"]) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=planner.Report)
    assert report.command == (
        f"jaxserve serve {tmp_path} --max-num-seqs=4 --max-num-batched-tokens=16 --num-kv-pages=64"
    )
    assert report.fits and report.compile_seconds > 0 and len(report.steps) == 2
    assert any(line.startswith("  start it   jaxserve serve") for line in lines(report))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --topology; known are v5e"),
        (["--topology", "v5e:5x5"], "'v5e:5x5' is not known"),
        (["--topology", "cpu:1", "cpu:2"], "give one, or --sweep"),
        (["--topology", "cpu:1", "--mesh", "1x2"], "mesh 1x2 needs 2 devices, found 1; leave --mesh out"),
        (["--topology", "cpu:64"], "XLA_FLAGS=--xla_force_host_platform_device_count=64"),
        (["--topology", "cpu:1", "--context", "0"], "context"),
        (["--topology", "cpu:1", "--mesh", "rows=2"], "unknown axis 'rows'"),
    ],
)
def test_bad_input_is_refused(capsys, flags, said):
    assert cli.call(["plan", str(GOLDENS / "llama2"), *flags]) == cli.USAGE
    assert said in capsys.readouterr().err


def test_a_config_that_is_none_is_refused(tmp_path, capsys):
    assert cli.call(["plan", str(tmp_path), "--topology", "cpu:1"]) == cli.USAGE
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    assert cli.call(["plan", str(tmp_path), "--topology", "cpu:1"]) == cli.USAGE
    assert "architecture NoSuchModel is not served" in capsys.readouterr().err


def test_a_gemma_with_a_vision_tower_is_planned_by_its_text(tmp_path):
    text = {"hidden_size": 8, "architectures": ["other"]}
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert open_config(tmp_path) == text | {"architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True}


# --- configs/ -------------------------------------------------------------------------------------------------------


def deployments():
    """(file, model's shape, topology) of every line `# jaxserve plan ...` at the top of a file of configs/."""
    found = []
    for file in sorted((ROOT / "configs").glob("*.toml")):
        for line in file.read_text().splitlines():
            if line.startswith("# jaxserve plan "):
                _, _, _, model, _, config, _, where = line.split()
                assert ROOT / config == file
                found.append(pytest.param(file, ROOT / model, where, id=f"{file.stem} on {where}"))
    return found


@pytest.mark.parametrize(("file", "model", "where"), deployments())
def test_a_deployment_divides_and_fits_by_arithmetic(file, model, where):
    values = {k: v for k, v in options.flatten(file).items() if k != "host"}
    name = values.pop("model")
    assert name.split("/")[1].lower().startswith(model.stem), "the shape is that of the model that is served"
    found = plan(
        replace(engine_options_of(name, values)), model, Topology.parse(where), mesh=lambda _, shape: sketched(shape),
        compile_one=made_up(workspace=GIB),
    )  # fmt: skip
    assert found.fits, found.problem
    assert found.devices == Topology.parse(where).count, "every device is used"
    assert found.hosts == 1, "one process cannot yet serve on several"
    assert found.max_model_len == values["max_model_len"]
    assert found.kv_tokens >= 512 * found.max_num_seqs, "room for all that may run"


def test_there_is_one_for_each_that_was_promised():
    found = {(p.values[1].stem, p.values[2].split(":")[0]) for p in deployments()}
    assert found == {
        ("llama-3.1-8b", "v5e"), ("llama-3.3-70b", "v5p"), ("llama-3.3-70b", "v6e"), ("qwen3-30b-a3b", "v6e"),
        ("llama-3.1-8b", "h100"), ("llama-3.1-8b", "h200"),
    }  # fmt: skip


def test_files_of_configs_are_toml_that_serve_takes():
    for file in sorted((ROOT / "configs").glob("*.toml")):
        assert tomllib.loads(file.read_text()) and options.flatten(file)


# --- with the TPU's compiler ----------------------------------------------------------------------------------------


@pytest.mark.timeout(900)  # the compiler takes two minutes of a core
def test_a_plan_for_tpu_is_compiled(tmp_path, capsys):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU's compiler is not installed; `make compile-gate` has an environment where it is")
    hf = json.loads(LLAMA_8B.read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert cli.call(["plan", str(tmp_path), "--topology", "v5e:2x4", "--mesh", "1x8", "--json"]) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=planner.Report)
    assert report.fits and report.messages_per_block == 2 and report.attention == "tpu"
    _, decoding = report.steps
    known = sum(report.device_bytes[kind] for kind in ("weights", "kv", "slots"))
    assert known <= decoding.arguments < 1.01 * known, "arithmetic and memory_analysis agree, but for padding"
    assert decoding.updated >= report.device_bytes["kv"]
