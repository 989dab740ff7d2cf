"""References to code that is imported only when it is needed.

Hooks return cheap descriptors; what is heavy (a kernel's builder, an op's reference, a command) is named as
``"package.module:attr"`` and imported on first use, so that listing plugins or printing help loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from kernelforge.errors import PluginError

Ref = str | Callable[..., Any]
"""Either the object itself or its address, ``"package.module:attr"``."""


def resolve(ref: Ref) -> Any:
    """The object behind `ref`.

    Raises PluginError when the address is malformed or names nothing; errors raised by the module's own import pass
    through unchanged, so that their cause stays visible.
    """
    if not isinstance(ref, str):
        return ref
    module_name, separator, attribute = ref.partition(":")
    if not (module_name and separator and attribute):
        raise PluginError(f"'{ref}' is not a reference", hint='write it as "package.module:attr"')
    target: Any = import_module(module_name)
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            raise PluginError(f"module '{module_name}' has no attribute '{attribute}' (wanted by '{ref}')") from None
    return target
