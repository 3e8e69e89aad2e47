"""The compile gate: what it reads from a compiler's output, and where libtpu is installed, a part of the gate."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from tool_files import TOOLS, load_tool

PROGRAM = TOOLS / "compile_gate.py"


@pytest.fixture(scope="module")
def gate():
    return load_tool("compile_gate")


@pytest.fixture(scope="module")
def judged(gate):
    return importlib.import_module("gates_judged")  # the gate has said where it is


@pytest.fixture(scope="module")
def steps(gate):
    return importlib.import_module("gates_step_judged")


def test_copies_of_the_cache_are_found(judged):
    """In a program that keeps the cache it was given, and not in one that may change it."""
    cache = jnp.zeros((64, 16, 128), jnp.float32)

    def compiled(**options):
        return jax.jit(lambda c, r: c.at[3].set(r), **options).lower(cache, cache[0]).compile().as_text()

    assert list(judged.copies(compiled(), cache.nbytes)) and not list(
        judged.copies(compiled(donate_argnums=0), cache.nbytes)
    )


@pytest.mark.parametrize(
    ("instruction", "copied"),
    [
        ("%copy.38 = f8e4m3fn[524288,512]{1,0:T(8,128)(4,1)} copy(%bitcast.2)", True),
        ("%copy-start = (bf16[64,16,128]{2,1,0:S(1)}, bf16[64,16,128]{2,1,0}, u32[]) copy-start(%cache)", True),
        ("%copy.1 = f32[8,128]{1,0} copy(%small)", False),
        ("%custom-call.1 = bf16[64,16,128]{2,1,0} custom-call(%a, %copy), custom_call_target=\"x\"", False),
    ],
)  # fmt: skip
def test_what_a_copy_looks_like(judged, instruction, copied):
    assert bool(list(judged.copies(f"ENTRY %main {{\n  {instruction}\n}}", 64 * 16 * 128 * 2))) == copied


def test_a_listing_is_counted(judged):
    listing = """
= control target key start
LB: loop body
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sld [smem:[#allocation18_spill]]  ;;  %s3 = smov 1 }
   0x2   : > { %s4 = smov 2 }
hlo: kernel
 */ }
   0x3   : > { %s5 = smov 3 }
   0x4 PF:  { %s6 = smov 4 }
   0x5   :  {}
"""
    assert judged.schedule(listing) == (6, [2, 3], 1)


def test_limits_bite(gate):
    assert gate.over({"decode.bundles": 103}, {"decode.bundles": 100}) == []
    (problem,) = gate.over({"decode.bundles": 104}, {"decode.bundles": 100})
    assert problem == "decode.bundles is 104; the limit is 103"
    assert gate.over({"decode.bundles": 1}, None) and gate.over({"decode.bundles": 1}, {})


def test_every_gate_has_limits(gate):
    stored, passed = (json.loads(path.read_text()) for path in (gate.LIMITS, gate.PROGRAMS))
    assert set(stored) == {g.name for g in gate.gates()}
    assert gate.FEW < set(stored) and set(passed) <= set(stored)


@pytest.mark.parametrize("name", ["v5e/llama3-8b/bfloat16/page64/decode", "v6e/llama3-8b/float8_e4m3fn"])
def test_the_kernel_compiles_for_tpu(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU's compiler is not installed; `make compile-gate` runs the gate where it is")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--json", "--only", name], env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert found["bundles"]["attention_decode"] > 100 and not found["problems"]


def test_registers_are_read_from_what_ptxas_says(judged):
    """Of Mosaic's kernels and, in between what XLA says, of Triton's; a warning says spills once more."""
    said = """ptxas warning : Registers are spilled in function 'x', 8 bytes spill stores, 4 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'jaxserve_attention_decode_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 174 registers, used 2 barriers, 1 bytes smem
I1122 05:58:50.060208    6692 nvptx_compiler.cc:685] something else
"""
    triton = said.replace("decode_mosaic_gpu_kernel", "prefill").replace("174", "96")
    both = said + said.replace("jaxserve_attention_decode", "another") + triton
    assert list(judged.registers(both)) == [("attention_decode", 174, 12), ("attention_prefill", 96, 12)]


def test_registers_by_the_machines_own_ptxas_have_no_limit(judged):
    found = judged.Found(1.0, 1.0, registers=dict(a=200, b=100), spills=dict(a=0, b=8), by_machine=["b"])
    assert found.limits() == {"temp_bytes": 0, "a.registers": 200, "a.spills": 0, "b.spills": 8}


def test_the_kernel_compiles_for_gpu():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("JAX's CUDA compiler is not installed; `make compile-gate` runs the gate where it is")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--json", "--only", "h100/llama3-8b/bfloat16/page64/decode-1"],
        env=dict(os.environ), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert found["registers"]["attention_decode"] > 100 and not found["problems"]


# --- whole steps ----------------------------------------------------------------------------------------------------


def test_copies_of_a_weight_are_found(steps):
    hlo = """
HloModule jit__step

%fused (p: bf16[64,128]) -> bf16[128,64] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %t = bf16[128,64]{1,0} transpose(%p), dimensions={1,0}
}

ENTRY %main {
  %params_0.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="params[0]"}
  %norm = bf16[128]{0} parameter(1), metadata={op_name="params[1]"}
  %x = bf16[64,128]{1,0} parameter(2)
  %bitcast.1 = bf16[8192]{0} bitcast(%params_0.1)
  %fetch = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%params_0.1)
  %cut = bf16[8,128]{1,0} slice(%params_0.1), slice={[0:8], [0:128]}
  %y = bf16[64,128]{1,0} copy(%x)
  %dot = bf16[64,64]{1,0} fusion(%params_0.1, %x), kind=kOutput, calls=%fused
@
}
"""
    assert steps.weight_copies(hlo.replace("@", ""), 2, least=1024) == {}
    for name, made, line in (
        ("copy.7", 16384, "bf16[8192]{0} copy(%bitcast.1)"),
        ("fusion.3", 16384, "bf16[128,64]{1,0:T(8,128)(2,1)} fusion(%params_0.1), kind=kLoop, calls=%fused"),
        ("wide", 32768, "f32[64,128]{1,0} convert(%params_0.1)"),
    ):
        assert steps.weight_copies(hlo.replace("@", f"  %{name} = {line}"), 2, least=1024) == {name: made}


def test_a_step_compiles_for_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU's compiler is not installed; `make compile-gate` runs the gate where it is")
    command = [sys.executable, str(PROGRAM), "--json", "--only", "step/qwen3-0.6b/v5e:2x4/decode"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert found["temp_bytes"] > 0 and not found["problems"]


# --- which programs have been compiled ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digests(gate):
    return importlib.import_module("gates_digest")


PLAIN = """
def run(x):
    with jax.named_scope("{scope}"):
        return jnp.sin(x) * {factor}
"""
KERNEL = """
def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] * {factor}

def run(x):
    return pl.pallas_call(kernel, out_shape=x, name="{scope}")(x)
"""
MOSAIC_GPU = KERNEL.replace(
    "pl.pallas_call(kernel, out_shape=x, name=", "plgpu.kernel(kernel, out_type=x, kernel_name="
)


def lowered(source, platform, path="/here/model.py", factor=2.0, scope="part"):
    """What a function of a source file at `path` is lowered to for a platform that is not here."""
    names = {"jax": jax, "jnp": jnp, "pl": pl, "plgpu": plgpu}
    exec(compile(source.format(factor=factor, scope=scope), path, "exec"), names)
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
        traced = jax.jit(names["run"]).trace(jax.ShapeDtypeStruct((128, 128), jnp.float32))
        return traced.lower(lowering_platforms=(platform,))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("platform", "source"), [("cpu", PLAIN), ("tpu", KERNEL), ("cuda", KERNEL), ("cuda", MOSAIC_GPU)]
)
def test_a_digest_says_which_program_it_is(digests, platform, source):
    """Not where its source is, nor which lines it has there; nor is it of the kernels' bytecode, which holds both."""
    first = lowered(source, platform)
    elsewhere = lowered("# moved\n" * 7 + source.replace(" * ", "  *  "), platform, "/there/other.py")
    assert elsewhere.as_text(debug_info=True) != first.as_text(debug_info=True)
    same = digests.digest(first, 0)
    assert digests.digest(elsewhere, 0) == same and digests.digest(lowered(source, platform), 0) == same
    assert digests.digest(lowered(source, platform, factor=2.5), 0) != same
    assert digests.digest(lowered(source, platform, scope="another"), 0) != same, "messages are told apart by scopes"
    assert digests.digest(first, "a cache of 8 bytes") != same


def test_a_digest_says_what_the_compiler_is_told_besides(digests, monkeypatch):
    first = lowered(PLAIN, "cpu")
    same = digests.digest(first, 0)
    for changed in (
        lambda m: m.setattr(digests, "version", lambda name: "99"),
        lambda m: m.setenv("XLA_FLAGS", "--xla_of_another_kind"),
        lambda m: m.setattr(digests, "SOURCES", digests.SOURCES[1:]),
    ):
        with monkeypatch.context() as patch:
            digests.surroundings.cache_clear()
            changed(patch)
            assert digests.digest(first, 0) != same
    digests.surroundings.cache_clear()
    assert digests.digest(first, 0) == same


TWO_ORDERS = """
import sys
import jax, jax.numpy as jnp
sys.path.insert(0, sys.argv[1])
import gates_digest
for devices in (jax.devices(), jax.devices()[::-1]):
    split = jax.NamedSharding(jax.make_mesh((2,), ("x",), devices=devices), jax.P("x"))
    lowered = jax.jit(jnp.sin, out_shardings=split).lower(jax.ShapeDtypeStruct((8,), jnp.float32))
    print(lowered.as_text().encode().hex(), gates_digest.digest(lowered, 0))
"""


def test_a_digest_says_the_order_of_the_devices():
    """Which a program's text does not."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", TWO_ORDERS, str(TOOLS)]
    said = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == said[2] and said[1] != said[3]


def test_a_digest_says_what_judges(digests, tmp_path):
    code = "def look(compiled, large):\n    return {'figure': 1}, []\n"
    first, found = lowered(PLAIN, "cpu"), []
    for source in (code, f'"""What."""\n\n# Why.\n{code}', code.replace("1", "2")):
        names, path = {}, tmp_path / f"{len(found)}.py"
        path.write_text(source)
        exec(compile(source, str(path), "exec"), names)
        found.append(digests.digest(first, 0, names["look"]))
    assert found[0] == found[1] != found[2] and digests.digest(first, 0) not in found
    documented = "class A:\n    'Why.'\n    def f(self): 'How.'; return 1"
    assert digests.without_comments(documented) == "class A:\n\n    def f(self):\n        return 1"
    for name in (*digests.SOURCES, *digests.SOURCES_OF_LOOKS):
        assert (TOOLS.parent / name).exists()


@pytest.fixture
def run(gate, monkeypatch, tmp_path, capsys):
    """(values of the gates' constants, arguments) -> exit status, those that were compiled, those that were not. The
    gates are programs for the CPU, compiled in this process; the first is one of the few."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path / "dump"))
    (tmp_path / "dump").mkdir()
    (tmp_path / f"{os.getpid()}.stderr").touch()
    monkeypatch.setattr(gate, "LIMITS", tmp_path / "limits.json")
    monkeypatch.setattr(gate, "PROGRAMS", tmp_path / "programs.json")
    monkeypatch.setattr(gate, "FEW", {"0"})
    monkeypatch.setattr(gate, "measured", lambda tasks, jobs: map(gate._measure_named, tasks))

    def run(factors, *arguments):
        def program(factor):
            if factor is None:
                raise ValueError("no such kernel")
            return jax.jit(lambda x: x * factor).lower(jax.ShapeDtypeStruct((8,), jnp.float32)), 0

        known = [gate.Gate(str(i), lambda factor=factor: program(factor)) for i, factor in enumerate(factors)]
        monkeypatch.setattr(gate, "gates", lambda: known)
        status = gate.main([*arguments, "--json"])
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return status, *("".join(f["gate"] for f in found if f["same"] == same) for same in (False, True))

    return run


def test_what_passed_is_not_compiled_again_if_only_changes_are_asked_for(gate, run):
    assert run([2, 3, 4], "--changed") == (1, "012", ""), "none has limits"
    assert run([2, 3, 4], "--changed", "--update") == (0, "012", "")
    assert run([2, 3, 4], "--changed") == (0, "", "012")
    assert run([2, 3, 4]) == (0, "012", "")
    assert run([2, 3, 4], "--few") == (0, "0", "")
    assert run([2, 3, 4], "--few", "--changed") == (0, "0", "12")
    assert run([2, 3, 5], "--few", "--changed") == (0, "02", "1")
    assert run([2, 3, 5], "--changed", "--only", "1", "2") == (0, "2", "1"), "what was not updated is not stored"
    assert run([2, 3, 5], "--changed", "--update") == (0, "2", "01")
    assert run([2, 3, 5], "--changed") == (0, "", "012")
    assert run([2, 3, None], "--changed", "--update") == (1, "2", "01")
    assert run([2, 3, 5], "--changed") == (0, "", "012"), "one that failed is not stored"
    assert run([2, 3], "--few", "--update") == (0, "0", "")
    assert set(json.loads(gate.PROGRAMS.read_text())) == set(json.loads(gate.LIMITS.read_text())) == {"0", "1"}


def test_a_limit_that_was_written_by_hand_is_tried(gate, run):
    assert run([2, 3], "--update") == (0, "01", "")
    limits = json.loads(gate.LIMITS.read_text())
    limits["1"]["temp_bytes"] = -8
    gate.LIMITS.write_text(json.dumps(limits))
    assert run([2, 3], "--changed") == (1, "1", "0")
