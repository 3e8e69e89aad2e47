"""What every test runs under: CPU, strict promotion of dtypes and ranks, a compile cache kept between runs.

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


LONGEST = ("test_native.py", "test_models.py", "test_sharding.py", "test_two_hosts.py")
"""Files that take minutes."""


def pytest_collection_modifyitems(items):
    """Those first: two processes take a file each, and at the end none is to wait for the other."""
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


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
