"""The CPU backend of KernelForge."""
