"""Attention kernels that know jax and nothing of jaxserve."""
