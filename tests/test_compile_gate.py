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
from tool_files import TOOLS, load_tool

PROGRAM = TOOLS / "compile_gate.py"


@pytest.fixture(scope="module")
def gate():
    return load_tool("compile_gate")


@pytest.fixture(scope="module")
def steps(gate):
    return importlib.import_module("gates_step")  # the gate has said where it is


def test_copies_of_the_cache_are_found(gate):
    """In a program that keeps the cache it was given, and not in one that may change it."""
    cache = jnp.zeros((64, 16, 128), jnp.float32)

    def compiled(**options):
        return jax.jit(lambda c, r: c.at[3].set(r), **options).lower(cache, cache[0]).compile().as_text()

    assert list(gate.copies(compiled(), cache.nbytes)) and not list(
        gate.copies(compiled(donate_argnums=0), cache.nbytes)
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
def test_what_a_copy_looks_like(gate, instruction, copied):
    assert bool(list(gate.copies(f"ENTRY %main {{\n  {instruction}\n}}", 64 * 16 * 128 * 2))) == copied


def test_a_listing_is_counted(gate):
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
    assert gate.schedule(listing) == (6, [2, 3], 1)


def test_limits_bite(gate):
    assert gate.over({"decode.bundles": 103}, {"decode.bundles": 100}) == []
    (problem,) = gate.over({"decode.bundles": 104}, {"decode.bundles": 100})
    assert problem == "decode.bundles is 104; the limit is 103"
    assert gate.over({"decode.bundles": 1}, None) and gate.over({"decode.bundles": 1}, {})


def test_every_gate_has_limits(gate):
    stored = json.loads(gate.LIMITS.read_text())
    assert set(stored) == {g.name for g in gate.gates()}
    assert gate.FEW < set(stored)


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


def test_registers_are_read_from_what_ptxas_says(gate):
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
    assert list(gate.gates_gpu.registers(both)) == [("attention_decode", 174, 12), ("attention_prefill", 96, 12)]


def test_registers_by_the_machines_own_ptxas_have_no_limit(gate):
    found = gate.Found(1.0, 1.0, registers=dict(a=200, b=100), spills=dict(a=0, b=8), by_machine=["b"])
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
