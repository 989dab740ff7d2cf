"""The kernels of kernelforge-metal, as WGSL generators."""
