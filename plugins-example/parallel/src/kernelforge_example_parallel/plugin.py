"""Registers the architecture `ParallelLlamaForCausalLM`: checkpoints that name it in their config.json can be run."""

from __future__ import annotations

from kernelforge.hookspecs import hookimpl
from kernelforge_llm.architecture import ArchitectureSpec


@hookimpl(optionalhook=True)  # it is kernelforge-llm's, and absent where only this plugin is loaded
def kernelforge_architectures() -> list[ArchitectureSpec]:
    load = "kernelforge_example_parallel.parallel_llama:ParallelLlama"
    summary = "Llama with attention and MLP side by side"
    return [ArchitectureSpec("ParallelLlamaForCausalLM", "parallel_llama", load, summary)]
