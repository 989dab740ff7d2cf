"""What fails after its plugin was loaded: a lazy reference, a kernel's `supports`, a reader of models.

That part is left out, in one warning, and the rest goes on. With KERNELFORGE_PLUGINS_STRICT it is an error.
"""

from __future__ import annotations

import warnings

from kernelforge.errors import KernelForgeError, KernelForgeWarning, PluginError
from kernelforge.home import env_flag
from kernelforge.provenance import BUILTIN, Provenance

STRICT = "KERNELFORGE_PLUGINS_STRICT"
"""Environment variable: no plugin may fail, not even one that nobody asked for."""


def leave_out(part: str, owner: Provenance, error: BaseException) -> str:
    """Warn that `part` of a plugin is left out; the reason, as a sentence without an end.

    Raises PluginError in strict mode, and for a part of core, without which nothing else is worth having.
    """
    reason = explain(error)
    message = f"{part} of plugin {owner} is left out: {reason}"
    if owner.plugin == BUILTIN.plugin:
        raise PluginError(message) from error
    if env_flag(STRICT):
        raise PluginError(message, hint=without(owner.plugin)) from error
    warnings.warn(KernelForgeWarning(f"{message}; {without(owner.plugin)}"), stacklevel=3)
    return reason


def failed(part: str, owner: Provenance, what: str, error: BaseException) -> PluginError:
    """The error for a part that something else depends on, to be raised."""
    hint = None if owner.plugin == BUILTIN.plugin else without(owner.plugin)
    return PluginError(f"{part} of plugin {owner} {what}: {explain(error)}", hint=hint)


def explain(error: BaseException) -> str:
    """What was raised, in one line."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    text = " ".join(str(error).split())
    if isinstance(error, KernelForgeError):
        return f"{text} ({error.hint})" if error.hint else text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def without(plugin: str) -> str:
    """How to do without a plugin."""
    return f"`kernelforge plugins disable {plugin}` leaves it out"
