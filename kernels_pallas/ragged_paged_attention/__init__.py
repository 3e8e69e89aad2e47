"""Ragged paged attention: one contract, one reference, one body a platform."""
