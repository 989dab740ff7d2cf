"""Plugins that the user has switched off: one empty file each, `KERNELFORGE_HOME/plugins/NAME.disabled`.

A file of its own is made and removed in one step, so that two commands at once cannot lose one another's change.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

from kernelforge.errors import AssetError
from kernelforge.home import plugins_dir

_SUFFIX = ".disabled"


def disabled() -> frozenset[str]:
    """Names of the plugins that are switched off."""
    return frozenset(unquote(file.name.removesuffix(_SUFFIX)) for file in plugins_dir().glob(f"*{_SUFFIX}"))


def disable(name: str) -> None:
    """Leave a plugin out from now on. Raises AssetError when that cannot be kept."""
    file = _file(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise AssetError(
            f"cannot write {file}: {error.strerror or error}",
            hint=f"set KERNELFORGE_HOME to a folder that can be written, or KERNELFORGE_PLUGINS_DISABLE={name}",
        ) from None


def enable(name: str) -> bool:
    """Undo `disable`; whether it was disabled. Raises AssetError when its file cannot be removed."""
    file = _file(name)
    try:
        file.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise AssetError(f"cannot remove {file}: {error.strerror or error}") from None
    return True


def _file(name: str) -> Path:
    return plugins_dir() / f"{quote(name, safe='')}{_SUFFIX}"
