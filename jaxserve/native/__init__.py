"""The C++ kernels for CPU, as XLA custom calls: finds or builds their library and registers them with JAX."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxserve.native.build import BuildError, library

TARGETS = (
    "jaxserve_linear",
    "jaxserve_embed",
    "jaxserve_linear_blocks",
    "jaxserve_embed_blocks",
    "jaxserve_ragged_paged_attention",
    "jaxserve_untouched",
    "jaxserve_rms_norm",
    "jaxserve_sample",
    "jaxserve_token_logprobs",
)

_lock = threading.Lock()
_library: ctypes.CDLL | None = None


def loaded() -> bool:
    """Whether `load` has succeeded in this process."""
    return _library is not None


def handlers() -> ctypes.CDLL:
    """The loaded library."""
    assert _library is not None, "load() comes first"
    return _library


def by_platform[Result](cpu: Callable[..., Result], otherwise: Callable[..., Result], *arguments: Any) -> Result:
    """`cpu`, which calls the kernels, where they are loaded and the program is for CPU; `otherwise` does the same."""
    if not loaded():
        return otherwise(*arguments)
    result: Result = jax.lax.platform_dependent(*arguments, cpu=cpu, default=otherwise)
    return result


def load(progress: Callable[[str], None] = lambda message: None) -> None:
    """Makes the kernels callable in this process, once. Raises BuildError if no library is there or can be made."""
    global _library
    with _lock:
        if _library is not None:
            return
        path = library(progress)
        try:
            found = ctypes.CDLL(str(path))
            for target in TARGETS:
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(found, target)), platform="cpu")
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} does not load: {error}") from error
        _library = found
