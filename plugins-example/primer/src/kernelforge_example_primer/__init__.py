"""An example of a dialect plugin: an op with a reference, and a kernel for it."""
