"""What kernelforge-llm registers."""

from __future__ import annotations

from collections.abc import Iterable

from kernelforge.descriptors import CommandSpec, ImporterSpec
from kernelforge.hookspecs import hookimpl
from kernelforge_llm.architecture import ArchitectureSpec

kernelforge_hookspecs = "kernelforge_llm.hookspecs"

_FOLDER = "kernelforge_llm.architectures"


@hookimpl
def kernelforge_architectures() -> Iterable[ArchitectureSpec]:
    return (
        ArchitectureSpec("LlamaForCausalLM", "llama", f"{_FOLDER}.llama:Llama", "Llama, with optional biases"),
        ArchitectureSpec("MistralForCausalLM", "mistral", f"{_FOLDER}.mistral:Mistral", "Mistral, sliding window"),
        ArchitectureSpec("Qwen2ForCausalLM", "qwen2", f"{_FOLDER}.qwen2:Qwen2", "Qwen2, biases on q, k and v"),
        ArchitectureSpec("Qwen3ForCausalLM", "qwen3", f"{_FOLDER}.qwen3:Qwen3", "Qwen3, norms of q and k"),
    )


@hookimpl
def kernelforge_importers() -> Iterable[ImporterSpec]:
    return (ImporterSpec("llm", "kernelforge_llm.importer:LlmImporter", "Hugging Face folders and named shapes"),)


@hookimpl
def kernelforge_commands() -> Iterable[CommandSpec]:
    verbs = "kernelforge_llm.verbs"
    return (
        CommandSpec("llm-inference", f"{verbs}.inference:llm_inference", "Generate text with a model."),
        CommandSpec("llm-bench", f"{verbs}.bench:llm_bench", "Measure prefill and decode speed of a model."),
        CommandSpec("llm-eval", f"{verbs}.evaluate:llm_eval", "Measure the perplexity of a model on a text."),
        CommandSpec("llm-quantize", f"{verbs}.quantise:llm_quantize", "Write a model's weights in 8 or 4 bits."),
        CommandSpec("llm-export", f"{verbs}.export:llm_export", "Write a model as a standard safetensors folder."),
    )
