"""What a model architecture is: how its configuration is read, and the graph of one forward step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kernelforge.errors import AssetError, PluginError
from kernelforge.lazy import Ref, resolve
from kernelforge.provenance import BUILTIN, Provenance

if TYPE_CHECKING:
    from kernelforge.graph import Graph, Tensor
    from kernelforge.registry import Registry

    from kernelforge_llm.config import ModelConfig
    from kernelforge_llm.model import StepInputs, WeightTable


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
    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        """Read config.json and generation_config.json. Raises AssetError for what is wrong or not supported."""
        ...

    def hidden_states(self, g: Graph, config: ModelConfig, weights: WeightTable, step: StepInputs) -> Tensor:
        """The states of every token after the final norm, [tokens, hidden_size] f32."""
        ...


def find_architecture(raw: Mapping[str, Any], registry: Registry) -> Architecture:
    """The architecture that `config.json` names. Raises AssetError listing the known ones when it is unknown."""
    specs: tuple[ArchitectureSpec, ...] = tuple(registry.extra("kernelforge_architectures"))
    names = raw.get("architectures") or []
    wanted = names[0] if isinstance(names, list) and names else None
    for spec in specs:
        if spec.name == wanted or (wanted is None and spec.model_type == raw.get("model_type")):
            found: Architecture = resolve(spec.load)()
            return found
    shown = wanted or raw.get("model_type") or "none named"
    raise AssetError(
        f"unknown architecture {shown!r} in config.json",
        hint=f"known: {', '.join(sorted(s.name for s in specs))}; a plugin can add one (hook kernelforge_architectures)",
    )
