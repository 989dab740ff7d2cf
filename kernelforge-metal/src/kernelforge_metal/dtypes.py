"""Element types of shaders; a module of its own, so that a plugin with a WGSL kernel loads at once."""

DTYPES = ("f32", "f16", "bf16", "i32")
"""What shaders load and store; f16 without the feature, and bf16, as halves of words."""

CACHE_DTYPES = (*DTYPES, "q8")
"""The same of kernels that read or write KV caches."""
