"""The C++ kernels for CPU, as XLA custom calls: finds or builds their library and registers them with JAX."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxserve.native.build import BuildError, Library, library

TARGETS = (
    "jaxserve_linear",
    "jaxserve_grouped_linear",
    "jaxserve_embed",
    "jaxserve_linear_blocks",
    "jaxserve_grouped_linear_blocks",
    "jaxserve_embed_blocks",
    "jaxserve_ragged_paged_attention",
    "jaxserve_untouched",
    "jaxserve_rms_norm",
    "jaxserve_layer_norm",
    "jaxserve_rotate",
    "jaxserve_by_head",
    "jaxserve_sample",
    "jaxserve_token_logprobs",
)

_lock = threading.Lock()
_library: tuple[ctypes.CDLL, Library] | None = None


def loaded() -> bool:
    """Whether `load` has succeeded in this process."""
    return _library is not None


def handlers() -> ctypes.CDLL:
    """The loaded library's functions."""
    assert _library is not None, "load() comes first"
    return _library[0]


def origin() -> Library:
    """The loaded library's file, and where it is from."""
    assert _library is not None, "load() comes first"
    return _library[1]


def by_platform[Result](cpu: Callable[..., Result], otherwise: Callable[..., Result], *arguments: Any) -> Result:
    """`cpu`, which calls the kernels, where they are loaded and the program is for one CPU; `otherwise` does the same.

    A custom call cannot be divided: on a mesh XLA would gather its arguments first.
    """
    if not loaded() or jax.sharding.get_abstract_mesh().size > 1:
        return otherwise(*arguments)
    result: Result = jax.lax.platform_dependent(*arguments, cpu=cpu, default=otherwise)
    return result


def load(progress: Callable[[str], None] = lambda message: None) -> None:
    """Makes the kernels callable in this process, once. Raises BuildError if no library is there or can be made."""
    global _library
    with _lock:
        if _library is not None:
            return
        found = library(progress)
        try:
            _library = _register(found), found
        except BuildError as error:
            if not found.prebuilt:
                raise
            progress(f"not using a library that came with the package: {error}")
            found = library(progress, prebuilt=False)
            _library = _register(found), found


def _register(found: Library) -> ctypes.CDLL:
    jax.devices("cpu")  # what XLA does not support it refuses here; before it runs it would fail later, and for good
    try:
        functions = ctypes.CDLL(str(found.path))
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(functions, target)), platform="cpu")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        raise BuildError(f"{found.path} does not load: {error}") from error
    return functions
