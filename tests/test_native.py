"""The C++ kernels: every instruction set gives the scalar one's bits, bad arguments give errors and no more."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import attention, native
from jaxserve.errors import ConfigError
from jaxserve.formats import FORMATS, dequantise, quantise
from jaxserve.native import blocks, build
from jaxserve.native import linear as dense
from jaxserve.native.attention import ragged_paged_attention
from jaxserve.native.norm import rms_norm

FUZZ = Path(__file__).parent / "native_fuzz.py"
CASES = 10

LIMIT_S = 800
pytestmark = pytest.mark.timeout(900)  # each library is as much work as an installation


WIDTHS = ("avx2", "neon", "scalar")
"""Instruction sets that stand for their families, whose others differ in wide.h alone, which has a test of its own."""


@pytest.fixture(scope="module")
def libraries(compiler, tmp_path_factory, pytestconfig):
    """By instruction set: the best of this processor and one for each width of vectors, or all where slow tests run."""
    folder = tmp_path_factory.mktemp("native")
    every = pytestconfig.option.markexpr != "not slow"
    best, found = build.best_isa(), {}
    for isa in build.ISAS:
        if isa.runs_here() and (every or isa == best or isa.name in WIDTHS):
            if isa == best:  # what serves, as the optimiser made it
                found[isa.name] = build.library(prebuilt=False).path
            else:  # only the numbers count, and calls take no longer for it
                found[isa.name] = folder / f"{isa.name}.so"
                as_tiles = ("-DJAXSERVE_STRETCHES",) if isa.name == "scalar" and best.name == "amx" else ()
                compile_at_once(compiler, isa, found[isa.name], *as_tiles)
    return found


def compile_at_once(compiler, isa, library, *more):
    """All sources as one and as they stand: headers are most of the work then, and are read once."""
    source = library.with_suffix(".cc")
    source.write_text("".join(f'#include "{path.name}"\n' for path in sorted(build.SOURCES.glob("*.cc"))))
    flags = [*build.FLAGS, *isa.compiler_flags, "-O0", *more, "-shared"]
    include = ["-isystem", jax.ffi.include_dir(), "-I", str(build.SOURCES)]
    subprocess.run([*compiler, *flags, *include, "-o", str(library), str(source)], check=True, timeout=LIMIT_S)


def fuzz(library, seed, *, cases=CASES, cpu=None, **environ):
    """(digest, that of products with bfloat16, that of those in stretches, bad calls that were refused) of a
    process of its own."""
    arguments = [library, seed, cases] + ([] if cpu is None else [cpu])
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # all libraries are called by the same few programs
    done = subprocess.run(
        [sys.executable, str(FUZZ), *map(str, arguments)],
        capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    *digests, refused = done.stdout.split()
    return *digests, int(refused)


def test_every_instruction_set_and_thread_count_gives_the_same_bits(libraries):
    found = {name: fuzz(library, 1) for name, library in libraries.items()}
    digest, with_bf16, in_stretches, refused = found["scalar"]
    assert refused > CASES
    for name, (others, others_bf16, others_in_stretches, others_refused) in found.items():
        assert (others, others_refused) == (digest, refused), name
        # Products of bfloat16 have an order of their own, which the process holds against arithmetic in numpy.
        assert others_bf16 == with_bf16 or name in ("amx", "avx512bf16"), name
        # The scalar library rounds rows as the one for tiles does, where there is one; others the process holds against
        # numpy's.
        if "amx" not in found or name in ("amx", "scalar"):
            assert others_in_stretches == in_stretches, name
    best = next(iter(libraries))
    assert fuzz(libraries[best], 1, cpu=min(os.sched_getaffinity(0))) == found[best], "one thread"


def digest(compiler, isa, program, runner=()):
    """What the kernels' arithmetic gives when it is compiled for `isa`."""
    sources = [FUZZ.with_name("native_digest.cc"), build.SOURCES / "parallel.cc"]
    include = ["-isystem", jax.ffi.include_dir(), "-I", str(build.SOURCES)]
    # One set of flags but for the vectors; not optimised, since only the numbers count.
    flags = [*build.FLAGS, *isa.compiler_flags, "-O0", "-w", "-static"]
    subprocess.run([*compiler, *flags, *include, "-o", str(program), *map(str, sources)], check=True, timeout=LIMIT_S)
    return subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout


def test_neon_gives_the_same_bits(compiler, tmp_path):
    """Cross-compiled, and emulated."""
    isas = {isa.name: isa for isa in build.ISAS}
    if not isas["scalar"].runs_here():
        pytest.skip("the scalar kernels do not run here")
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if cross is None or emulator is None:
        pytest.skip("aarch64-linux-gnu-g++ and qemu-aarch64 are needed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    want = digest(compiler, isas["scalar"], tmp_path / "scalar")
    assert digest([cross], isas["neon"], tmp_path / "neon", [emulator]) == want


def wide_digest(compiler, isa, folder, runner=(), *, reencoded=False):
    """What wide.h's operations give, compiled for `isa`; `reencoded`: AVX-VNNI's products are AVX512-VNNI's instead."""
    source, program = folder / f"{isa.name}.s", folder / isa.name
    flags = [*build.FLAGS, *isa.compiler_flags, "-O1", "-I", str(build.SOURCES)]
    command = [*compiler, *flags, "-S", "-o", str(source), str(FUZZ.with_name("native_wide.cc"))]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    if reencoded:
        text = source.read_text()
        assert "{vex} vpdpbusd" in text and "{vex} vpdpwssd" in text
        source.write_text(text.replace("{vex} vpdp", "vpdp"))
    subprocess.run([*compiler, "-static", "-o", str(program), str(source)], check=True, timeout=LIMIT_S)
    return subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout


@pytest.fixture(scope="module")
def scalar_wide_digest(compiler, tmp_path_factory):
    (scalar,) = (isa for isa in build.ISAS if isa.name == "scalar")
    if not scalar.runs_here():
        pytest.skip("the scalar kernels do not run here")
    return wide_digest(compiler, scalar, tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("name", [isa.name for isa in build.ISAS if isa.name != "scalar"])
def test_products_of_bytes_are_the_same_on_every_instruction_set(compiler, scalar_wide_digest, tmp_path, name):
    """What differs between two of a processor's family is in wide.h alone, and whole numbers are exact."""
    isas = {isa.name: isa for isa in build.ISAS}
    isa, cross, runner, reencoded = isas[name], compiler, [], False
    if not isa.runs_here():
        if name == "avx2vnni" and isas["avx512vnni"].runs_here():
            reencoded = True
        elif "neon" in name:
            cross, runner = [shutil.which("aarch64-linux-gnu-g++")], [shutil.which("qemu-aarch64")]
            if None in cross + runner:
                pytest.skip(
                    "aarch64-linux-gnu-g++ and qemu-aarch64 are needed (Debian: g++-aarch64-linux-gnu, qemu-user)"
                )
        else:
            pytest.skip("this processor does not run it")
    if not build.knows(cross, isa):
        pytest.skip(f"{cross[0]} is too old for it")
    assert wide_digest(cross, isa, tmp_path, runner, reencoded=reencoded) == scalar_wide_digest


def test_a_compiler_that_is_older_than_the_processor_gets_what_it_knows(monkeypatch, compiler, tmp_path):
    best, *others = (isa for isa in build.ISAS if isa.runs_here())
    monkeypatch.setattr(build, "knows", lambda compiler, isa: isa != best)
    monkeypatch.setattr(build, "build", lambda isa, compiler, path: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = build.library(prebuilt=False)
    assert found.isa == others[0] and found.reason.endswith(f"{compiler[0]} is too old for {best.name}")
    monkeypatch.undo()
    assert build.knows(compiler, others[-1])
    assert not build.knows(compiler, build.Isa("none", (), (), ("-mno-such-thing",)))


def test_sanitizers_find_nothing(compiler, tmp_path):
    """Address and undefined-behaviour sanitizers over good and bad calls."""
    runtime = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{compiler[0]} has no address sanitizer here")
    library = tmp_path / "sanitized.so"
    # The optimiser would take minutes over what the sanitizers add, and the calls no less time.
    flags = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compile_at_once(compiler, build.best_isa(), library, *flags)
    # The C++ runtime has to be there before the sanitizer looks for its exceptions.
    stdcxx = subprocess.run([*compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True).stdout.strip()
    options = "detect_leaks=0,allocator_may_return_null=1"
    fuzz(library, 1, cases=12, LD_PRELOAD=f"{runtime} {stdcxx}", ASAN_OPTIONS=options)


def step(lens, new, *, pages=8, page=4):
    """Arguments of a step of whole sequences, heads 2, kv heads 1, head_dim 8."""
    rng = np.random.default_rng(0)
    tokens = sum(new)
    q, k, v = (jnp.asarray(rng.normal(size=(tokens, n, 8)), jnp.float32) for n in (2, 1, 1))
    table = jnp.arange(len(lens) * (pages // len(lens)), dtype=jnp.int32).reshape(len(lens), -1)
    cu = jnp.asarray([0, *np.cumsum(new)], jnp.int32)
    cache = jnp.zeros((pages, page, 16), jnp.float32)
    distribution = jnp.asarray([0, 0, len(lens)], jnp.int32)
    return [q, k, v, cache, jnp.asarray(lens, jnp.int32), table, cu, distribution]


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.quantised])
def test_a_row_of_many_is_what_it_is_alone(compiler, name):
    """Many rows may pass by on tile registers; here there are more panels and rows than an item of work takes."""
    native.load()
    rng, format, (depth, outputs) = np.random.default_rng(2), FORMATS[name], (768, 37)
    rows = quantise(format, rng.normal(size=(outputs, depth)).astype(np.float32))
    panels = jnp.asarray(blocks.pack(format, rows, depth))
    x = rng.normal(size=(1050, depth)).astype(np.float32)
    x[3], x[20, 5], x[1040, 700] = 0, np.inf, np.nan
    y = np.asarray(blocks.linear(jnp.asarray(x), panels, format, outputs, "float32"))
    some = [0, 3, 16, 20, 511, 512, 1040, 1049]
    for row in some:
        alone = np.asarray(blocks.linear(jnp.asarray(x[row : row + 1]), panels, format, outputs, "float32"))
        np.testing.assert_array_equal(y[row : row + 1], alone)
    together = np.asarray(blocks.linear(jnp.asarray(x[some]), panels, format, outputs, "float32"))
    np.testing.assert_array_equal(y[some], together)
    assert (y[3] == 0).all() and np.isnan(y[[20, 1040]]).all() and np.isfinite(y[[0, 16, 511, 512, 1049]]).all()
    want = x[:3] @ dequantise(format, rows).T
    assert np.abs(y[:3] - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_at_the_end_cost_nothing(compiler, name, dtype):
    """What a step is filled up with: not even a weight that is no number is read for them."""
    native.load()
    rng, format, (depth, outputs) = np.random.default_rng(7), FORMATS[name], (256, 20)
    x = rng.normal(size=(40, depth)).astype(dtype)
    x[7] = x[21:] = 0
    x[30:] *= -1
    w = rng.normal(size=(2, outputs, depth)).astype(np.float32)
    if format.quantised:
        matrices = [jnp.asarray(blocks.pack(format, quantise(format, one), depth)) for one in w]
        linear = partial(blocks.linear, format=format, outputs=outputs, dtype=dtype)
        grouped = partial(blocks.grouped_linear, format=format, outputs=outputs, dtype=dtype)
    else:
        w[:, 5] = np.nan
        (stored,) = (dtype for dtype, code in dense.WEIGHT_TYPES.items() if code == format.code)
        matrices = [jnp.asarray(dense.pack(one.astype(stored))) for one in w]
        linear = partial(dense.linear, outputs=outputs, dtype=dtype)
        grouped = partial(dense.grouped_linear, outputs=outputs, dtype=dtype)
    y = np.asarray(linear(x, matrices[0]))
    assert not y[21:].any() and not y[7, :5].any() and y[20, :5].all()
    assert y[:21].tobytes() == np.asarray(linear(x[:21], matrices[0])).tobytes()
    assert not np.asarray(linear(x[21:], matrices[0])).any()
    for first in (0, 8, 15, 40):  # rows 7 and from 21 on end a group, or do not
        sizes = np.array([first, 40 - first], np.int32)
        got = np.asarray(grouped(x, jnp.stack(matrices), sizes))
        both = [linear(x[:first], matrices[0]), linear(x[first:], matrices[1])]
        assert got.tobytes() == np.concatenate([np.asarray(part) for part in both]).tobytes()


HALVES = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}
"""Where a block's float16 scale begins; elsewhere at 0."""


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.quantised and name != "MXFP4"])
def test_scales_of_any_size_are_kept(compiler, name):
    """Beside blocks of weights a thousand times smaller; and one that is no number spoils its own outputs alone."""
    native.load()
    rng, format, (depth, outputs) = np.random.default_rng(6), FORMATS[name], (512, 20)
    w = rng.normal(size=(outputs, depth)) * 10.0 ** rng.integers(-3, 1, (outputs, depth // format.block)).repeat(
        format.block, axis=1
    )
    w[4] = 0
    rows = quantise(format, w.astype(np.float32))
    x = rng.normal(size=(40, depth)).astype(np.float32)

    def product(rows, x):
        panels = jnp.asarray(blocks.pack(format, rows, depth))
        return np.asarray(blocks.linear(jnp.asarray(x), panels, format, outputs, "float32"))

    y, want = product(rows, x), x @ dequantise(format, rows).T
    assert (np.abs(y - want).max(axis=0) <= 0.02 * np.abs(want).max(axis=0)).all()
    for half in (np.inf, np.nan):
        spoilt, at = rows.copy(), format.nbytes + HALVES.get(name, 0)  # of the second block
        spoilt[7, at : at + 2] = np.frombuffer(np.float16(half).tobytes(), np.uint8)
        for some in (slice(0, 1), slice(0, 40)):
            z = product(spoilt, x[some])
            assert not np.isfinite(z[:, 7]).any()
            np.testing.assert_array_equal(np.delete(z, 7, axis=1), np.delete(y[some], 7, axis=1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("around_one", [False, True])
def test_norm_rounds_where_it_says(compiler, dtype, around_one):
    """To the result's type before a weight, or only after the product with 1 + weight."""
    native.load()
    rng = np.random.default_rng(4)
    x, weight = (jnp.asarray(rng.normal(size=size), dtype) for size in ((9, 100), 100))
    got = rms_norm(x, weight, 1e-5, around_one=around_one)
    y, w = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    y = y / np.sqrt((y * y).mean(axis=1, keepdims=True) + 1e-5)
    y = y * (1 + w) if around_one else np.asarray(jnp.asarray(y, dtype), np.float64) * w
    assert got.dtype == dtype
    got, want = (np.asarray(a, np.float64) for a in (got, jnp.asarray(y, dtype)))
    if dtype == jnp.float32:
        np.testing.assert_allclose(got, want, rtol=1e-6)
    else:  # a number that lies between two may be rounded either way
        assert (got == want).mean() > 0.99
        np.testing.assert_allclose(got, want, rtol=2**-7)


@pytest.mark.parametrize(
    "caps", [{}, {"soft_cap": 1.5, "sinks": np.linspace(-3, 3, 6, dtype=np.float32)}], ids=["", "caps"]
)
def test_a_prompt_is_the_same_however_it_is_cut(compiler, caps):
    native.load()
    rng = np.random.default_rng(5)
    total, page = 200, 16
    q, k, v = (jnp.asarray(rng.normal(size=(total, n, 24)), jnp.float32) for n in (6, 2, 2))
    table = jnp.asarray(rng.permutation(20)[None], jnp.int32)
    run = jax.jit(lambda *a: ragged_paged_attention(*a, scale=0.2, window=150, **caps))

    def cut(*sizes):
        cache, out, done = jnp.full((20, page, 96), jnp.nan), [], 0
        for size in sizes:
            piece = slice(done, done + size)
            done += size
            lens, cu = jnp.asarray([done], jnp.int32), jnp.asarray([0, size], jnp.int32)
            some, cache = run(q[piece], k[piece], v[piece], cache, lens, table, cu, jnp.asarray([0, 0, 1], jnp.int32))
            out.append(np.asarray(some))
        return np.concatenate(out)

    whole = cut(200)
    for sizes in ([1] * 200, [7, 64, 1, 128], [63, 137], [199, 1]):
        np.testing.assert_array_equal(cut(*sizes), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[5].at[0, 0].set(8), "page 8 of sequence 0 is not in the cache"),
        (lambda a: a[5].at[0, 0].set(-1), "page -1 of sequence 0 is not in the cache"),
    ],
)
def test_a_wrong_page_is_an_error_and_the_next_call_works(compiler, change, message):
    native.load()
    run = jax.jit(lambda *a: ragged_paged_attention(*a, scale=1.0))
    good = step([5, 6], [2, 6])
    bad = [*good]
    bad[5] = change(good)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(run(*bad))
    assert np.isfinite(np.asarray(run(*good)[0])).all()


def test_without_a_compiler_xla_serves_and_says_so(monkeypatch):
    def nothing(progress):
        raise build.BuildError("no C++ compiler was found")

    monkeypatch.setattr(native, "load", nothing)
    name, reason, _ = attention.choose("auto", "cpu")
    assert name == "reference" and "no C++ compiler was found" in reason
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        attention.choose("cpu", "cpu")
    with pytest.raises(ConfigError, match="does not run on gpu"):
        attention.choose("cpu", "gpu")


@pytest.mark.parametrize("cxx", ["/no/such/compiler", "false"])
def test_a_compiler_that_does_not_run_is_named(monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(build.BuildError, match=f"CXX is '{cxx}'"):
        build.find_compiler()


def test_the_compilers_words_are_passed_on(monkeypatch, compiler, tmp_path):
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "attention.cc").write_text("int main() { return nothing; }")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(build.BuildError, match="nothing.*was not declared|undeclared"):
        build.build(build.best_isa(), compiler, tmp_path / "x.so")
    assert not (tmp_path / "x.so").exists()


def test_it_is_built_once_and_again_when_a_source_changes(monkeypatch, compiler, tmp_path):
    sources, built = tmp_path / "csrc", []
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "build", lambda isa, compiler, path: (built.append(path), path.parent.mkdir(
        parents=True, exist_ok=True), path.touch()))  # fmt: skip
    assert build.library() == build.library() and build.library().path == built[0] and len(built) == 1
    (sources / "simd.h").write_text("// another")
    assert build.library().path == built[1] != built[0]


def test_without_a_home_nobody_elses_library_is_loaded(monkeypatch, compiler):
    """A library in a folder that anyone can foresee, such as /tmp/jaxserve, could be anyone's."""
    monkeypatch.setattr(build, "cache_home", lambda: None)
    built = []
    monkeypatch.setattr(build, "build", lambda isa, compiler, path: built.append(path))
    assert build.library().path == build.library().path == built[0], "one folder a process"
    assert built[0].parents[1].stat().st_mode & 0o077 == 0
    built[0].parents[1].rmdir()
    build._temporary_home.cache_clear()
