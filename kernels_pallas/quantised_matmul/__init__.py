"""Rows times a matrix of small whole numbers with scales: one contract, one reference, bodies for TPU and GPU."""
