"""What every test runs under: CPU, strict promotion of dtypes and ranks, little optimised programs, caches that last.

Everything is set through the environment before JAX is imported, so that engine processes started by a test have it
too, and tests that need no JAX never import it.
"""

import getpass
import os
import sys
import tempfile
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


def pytest_collection_modifyitems(items):
    """Those first: two processes take a file each, and at the end none is to wait for the other."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


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
