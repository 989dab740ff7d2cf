"""`kernelforge plugins list | info | check | disable | enable | retry`. Only the first two import plugins here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from kernelforge import disabled
from kernelforge.cli import output
from kernelforge.discovery import CORE
from kernelforge.errors import AssetError, PluginError, UsageError
from kernelforge.home import plugins_dir
from kernelforge.plugins import DISABLE, NOT_CORE, core_registry, names_in
from kernelforge.quarantine import Quarantine
from kernelforge.registry import PluginStatus, lookup

Name = Annotated[str, typer.Argument(help="Name of the plugin, as `plugins list` shows it.")]


def list_plugins() -> dict[str, Any]:
    """List the plugins: name, distribution, version, state, load time, what they register."""
    out = output.current()
    statuses = out.registry.plugins
    out.table(
        ["plugin", "distribution", "version", "state", "ms", "registers"],
        [
            [key, s.distribution, s.version, s.state, round(s.seconds * 1e3, 1), _count(s)]
            for key, s in statuses.items()
        ],
    )
    for key, status in statuses.items():
        if status.broken:
            out.print(f"\n{key}: {status.error}" + (f"\n  {status.remedy}" if status.remedy else ""))
    for message in out.registry.unheeded:
        out.print(f"\n{message}")
    return {"plugins": [as_data(status) for status in statuses.values()]}


def info(name: Name) -> dict[str, Any]:
    """Show one plugin: where it comes from, its state, and the name of everything that it registers."""
    out = output.current()
    status = lookup("plugin", out.registry.plugins, name)
    out.print(f"plugin        {status.name}")
    out.print(f"distribution  {status.distribution} {status.version}")
    out.print(f"requires      {status.requires or 'declares no range of kernelforge-core'}")
    out.print(f"state         {status.state}" + (f": {status.error}" if status.error else ""))
    if status.remedy:
        out.print(f"              {status.remedy}")
    out.print(f"load time     {status.seconds * 1e3:.1f} ms")
    for hook, names in status.contributions.items():
        out.print(f"\n{hook} ({len(names)})")
        for registered in names:
            out.print(f"  {registered}")
    return {"plugin": as_data(status)}


def check(
    names: Annotated[list[str] | None, typer.Argument(help="Plugins to check; all when none is named.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that importing one plugin may take.")] = 30.0,
) -> dict[str, Any]:
    """Import each plugin in a process of its own, and lift its quarantine when that succeeds."""
    out = output.current()
    there = core_registry().plugins
    results: dict[str, dict[str, Any]] = {}
    out.data = {"plugins": results}
    for name in names or there:
        status = lookup("plugin", there, name)
        results[name] = _probe(status, timeout)
        out.print(
            f"{name}: {results[name]['state']}" + (f": {results[name]['error']}" if results[name]["error"] else "")
        )
    failed = [name for name, result in results.items() if result["state"] != "loaded"]
    if failed:
        raise PluginError(f"{len(failed)} of {len(results)} plugins failed: {', '.join(failed)}")
    return out.data


def disable(name: Name) -> dict[str, Any]:
    """Leave a plugin out from now on. None is imported, so this works also for one that breaks the process."""
    name = lookup("plugin", core_registry().plugins, name).name
    if name == CORE:
        raise UsageError(NOT_CORE)
    disabled.disable(name)
    output.current().print(f"{name} is disabled; `kernelforge plugins enable {name}` brings it back")
    return {"plugin": name, "disabled": True}


def enable(name: Name) -> dict[str, Any]:
    """Undo `plugins disable`."""
    out = output.current()
    if name not in disabled.disabled():
        lookup("plugin", core_registry().plugins, name)
    changed = disabled.enable(name)
    out.print(f"{name} is enabled" + ("" if changed else ": it was not disabled"))
    if name in names_in(DISABLE):
        out.warn(f"{DISABLE} still leaves it out")
    return {"plugin": name, "disabled": False, "changed": changed}


def retry(name: Name) -> dict[str, Any]:
    """Lift the quarantine of a plugin: the next command that needs plugins imports it again."""
    out = output.current()
    status = lookup("plugin", core_registry().plugins, name)
    trace = Quarantine(status.name, status.version, status.requires)
    reason = trace.left_over()
    trace.end()
    if trace.left_over():
        raise AssetError(f"the quarantine of {name} cannot be lifted: {plugins_dir()} cannot be written")
    out.print(f"{name} is imported again at the next start" if reason else f"{name} was not in quarantine")
    return {"plugin": name, "was_quarantined": bool(reason), "reason": reason}


def _probe(status: PluginStatus, timeout: float) -> dict[str, Any]:
    """The status of a plugin that a fresh process loads, or what became of that process."""
    command = [sys.executable, "-P", "-m", "kernelforge.cli.plugin_probe", status.name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {**as_data(status), "state": "failed", "error": f"its import did not end within {timeout:g} s"}
    lines = ran.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        ending = f"signal {-ran.returncode}" if ran.returncode < 0 else f"exit code {ran.returncode}"
        return {**as_data(status), "state": "failed", "error": f"importing it ended the process with {ending}"}
    found: dict[str, Any] = answer
    return found


def _count(status: PluginStatus) -> str:
    return ", ".join(
        f"{hook.removeprefix('kernelforge_')}: {len(names)}" for hook, names in status.contributions.items() if names
    )


def as_data(status: PluginStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "distribution": status.distribution,
        "version": status.version,
        "requires": status.requires,
        "state": status.state,
        "error": status.error,
        "remedy": status.remedy,
        "seconds": status.seconds,
        "registers": {hook: list(names) for hook, names in status.contributions.items()},
    }
