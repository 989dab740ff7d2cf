"""An example of a kernel plugin: RMS normalisation on GPUs, written in WGSL."""
