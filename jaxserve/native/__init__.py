"""The C++ kernels for CPU, as XLA custom calls: finds or builds their library and registers them with JAX."""

import ctypes
import threading
from collections.abc import Callable

import jax

from jaxserve.native.build import BuildError, library

TARGETS = ("jaxserve_linear", "jaxserve_ragged_paged_attention")

_lock = threading.Lock()
_loaded = False


def loaded() -> bool:
    """Whether `load` has succeeded in this process."""
    return _loaded


def load(progress: Callable[[str], None] = lambda message: None) -> None:
    """Makes the kernels callable in this process, once. Raises BuildError if no library is there or can be made."""
    global _loaded
    with _lock:
        if _loaded:
            return
        path = library(progress)
        try:
            handlers = ctypes.CDLL(str(path))
            for target in TARGETS:
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(handlers, target)), platform="cpu")
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} does not load: {error}") from error
        _loaded = True
