"""KernelForge: a kernel compiler for transformers that is extended by installing packages."""

import time

__version__ = "0.1.0"

STARTED = time.time()
"""When this process began to import its code."""
