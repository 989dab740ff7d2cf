"""The GPU backend of KernelForge, on wgpu."""
