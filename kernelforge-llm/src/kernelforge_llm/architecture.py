"""What a model architecture is: how its configuration is read, and the graph of one forward step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kernelforge.errors import AssetError, PluginError
from kernelforge.lazy import Ref, resolve
from kernelforge.provenance import BUILTIN, Provenance
from kernelforge_llm.config_keys import shorten

if TYPE_CHECKING:
    from kernelforge.graph import Graph, Tensor
    from kernelforge.registry import Registry
    from kernelforge_llm.config import ModelConfig
    from kernelforge_llm.model import StepInputs
    from kernelforge_llm.weights import WeightTable


@dataclass(frozen=True)
class ArchitectureSpec:
    """An architecture, as the hook `kernelforge_architectures` returns it."""

    name: str
    """The class name in `architectures` of config.json: "LlamaForCausalLM"."""
    model_type: str
    """`model_type` of config.json, used when `architectures` is absent."""
    load: Ref
    """Resolves to a class without constructor arguments that implements `Architecture`."""
    summary: str = ""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PluginError(f"architecture name '{self.name}' must be a class name such as LlamaForCausalLM")


class Architecture(Protocol):
    """What `ArchitectureSpec.load` resolves to."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], *, source: str) -> ModelConfig:
        """Read config.json and generation_config.json, mostly through `ModelConfig.from_hf`.

        `source` names the file in messages. Raises AssetError for what is wrong or not supported.
        """
        ...

    def hidden_states(self, g: Graph, config: ModelConfig, weights: WeightTable, step: StepInputs) -> Tensor:
        """The states of every token after the final norm, [tokens, hidden_size] f32."""
        ...


def find_architecture(raw: Mapping[str, Any], registry: Registry, *, source: str) -> Architecture:
    """The architecture that config.json names. Raises AssetError, which names the file `source`, when it is unknown."""
    from kernelforge_llm.config_file import architecture_name

    specs: tuple[ArchitectureSpec, ...] = registry.extra("kernelforge_architectures")
    try:
        name = architecture_name(raw)
    except AssetError as error:
        raise AssetError(f"{source}: {error}") from None
    wanted = name or raw.get("model_type")
    for spec in specs:
        if wanted == (spec.name if name else spec.model_type):
            found: Architecture = resolve(spec.load)()
            return found
    what = f"architecture {shorten(wanted)} is unknown" if wanted else "names no architecture"
    raise AssetError(
        f"{source}: {what}",
        hint=f"known: {', '.join(sorted(s.name for s in specs))}; a plugin may add one (kernelforge_architectures)",
    )
