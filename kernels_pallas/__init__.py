"""Kernels for attention and for experts that know jax and nothing of jaxserve."""
