"""What every test runs under: CPU, strict promotion of dtypes and ranks, little optimised programs, caches that last.

Everything is set through the environment before JAX is imported, so that engine processes started by a test have it
too, and tests that need no JAX never import it.
"""

import getpass
import os
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = Path(tempfile.gettempdir()) / f"jaxserve-test-cache-{getpass.getuser()}"

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_COMPILATION_CACHE_DIR=str(CACHE),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.05",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    HF_HUB_OFFLINE="1",
)
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # Many tests start processes, and reading JAX from its sources takes each four seconds of a processor. What is not
    # wanted beside the sources may lie here.
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(CACHE / "bytecode")
    sys.dont_write_bytecode = False


LONGEST = ("test_sharding.py", "test_native.py", "test_models.py", "test_two_hosts.py")
"""Files that take minutes."""


def pytest_addoption(parser):
    parser.addoption(
        "--one-in", type=int, default=1, metavar="N", help="of a test's many cases, the first and one in N"
    )


def pytest_collection_modifyitems(config, items):
    """Those first: two processes take a file each, and at the end none is to wait for the other."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    n, seen = config.option.one_in, set()
    for item in list(items) if n > 1 else ():
        test = item.nodeid.split("[")[0]
        if test in seen and zlib.crc32(item.nodeid.encode()) % n:
            items.remove(item)
            config.hook.pytest_deselected(items=[item])
        seen.add(test)


AS_SERVED = (
    *("test_decode_steps.py", "test_embeddings.py", "test_end_to_end.py", "test_fp8_cache.py"),
    *("test_int8_cache.py", "test_kernels.py", "test_moe.py", "test_sampling.py"),
)
"""Files that compare what several programs give, to the bit or to the token: compiled as a server's are.

Elsewhere the code runs a few times at most, and LLVM would take longer to optimise it than all else in the test.
"""
LITTLE = "JAX_DISABLE_MOST_OPTIMIZATIONS"


@pytest.fixture(autouse=True, scope="module")
def optimisation(request):
    """How far programs are optimised, in this process and in those that it starts."""
    little = request.path.name not in AS_SERVED
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LITTLE, str(little))
        jax = sys.modules.get("jax")
        if jax is not None and jax.config.values[LITTLE.lower()] != little:
            jax.config.update(LITTLE.lower(), little)
            jax.clear_caches()
        yield


@pytest.fixture(autouse=True)
def jax_cache_setting():
    """Tests that turn JAX's compile cache off, or point it elsewhere, do so for themselves alone."""
    yield
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.jax_compilation_cache_dir != str(CACHE):
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference models and data that is not part of the repository; the test is skipped without it."""
    path = Path(os.environ.get("JAXSERVE_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}; JAXSERVE_DATA names its folder")
    return path


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    """The C++ compiler's command; the test is skipped where there is none, since XLA serves without one."""
    from jaxserve.native import build  # which imports JAX

    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def no_variables(monkeypatch):
    """No JAXSERVE_ variable of whoever runs the tests, and a terminal that breaks no line."""
    for name in [n for n in os.environ if n.startswith("JAXSERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def counter(tmp_path_factory) -> Path:
    """A model's folder with a tokenizer and nothing else, for engines that are not real."""
    from fake_engine import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("model") / "counter")


@pytest.fixture
def batch(tmp_path, counter, engine, monkeypatch):
    """`jaxserve batch IN OUT` in tmp_path, with the test file's own `engine`; its exit code."""
    from batch_running import install

    from jaxserve import cli

    install(monkeypatch.setattr, engine)
    monkeypatch.chdir(tmp_path)
    return lambda source, out, *flags: cli.call(["batch", str(source), str(out), str(counter), *flags])


@pytest.fixture
def without_races(capfd):
    """Parameters of the TPU's interpreter, whose memory is NaN until it is written, and which looks for races: of them,
    and of semaphores that are left non-zero, there must be none in the test."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    pltpu.reset_tpu_interpret_mode_state()
    yield pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager", num_cores_or_threads=2)
    jax.effects_barrier()
    said = "".join(capfd.readouterr())
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE" not in said and "non-zero" not in said
