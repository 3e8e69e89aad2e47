"""Rows times the matrix of their group: one contract, one reference, a body for TPU."""
