"""An example of a kernel plugin: matrix products on the CPU, written for numba."""
