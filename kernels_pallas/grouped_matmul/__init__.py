"""Rows times the matrix of their group, plain or quantised: one contract, one reference, bodies for TPU and GPU."""
