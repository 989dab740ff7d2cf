"""An example of a kernel plugin: SiLU on the CPU, compiled by numba."""
