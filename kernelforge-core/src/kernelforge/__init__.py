"""KernelForge: a kernel compiler for transformers that is extended by installing packages."""

__version__ = "0.1.0"
