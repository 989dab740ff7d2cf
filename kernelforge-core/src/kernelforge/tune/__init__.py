"""Measuring kernels: search strategies, verified trials, and the records that selection reads."""
