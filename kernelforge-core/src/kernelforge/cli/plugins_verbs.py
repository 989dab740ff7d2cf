"""`kernelforge plugins list | info | check`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.errors import PluginError
from kernelforge.plugins import core_registry
from kernelforge.registry import PluginStatus, lookup


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
        if status.error and status.state != "blocked":
            out.print(f"\n{key}: {status.error}")
    return {"plugins": [as_data(status) for status in statuses.values()]}


def info(
    name: Annotated[str, typer.Argument(help="Name of the plugin, as `plugins list` shows it.")],
) -> dict[str, Any]:
    """Show one plugin: where it comes from, its state, and the name of everything that it registers."""
    out = output.current()
    status = lookup("plugin", out.registry.plugins, name)
    out.print(f"plugin        {status.name}")
    out.print(f"distribution  {status.distribution} {status.version}")
    out.print(f"requires      {status.requires or 'declares no range of kernelforge-core'}")
    out.print(f"state         {status.state}" + (f": {status.error}" if status.error else ""))
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
        f"{len(names)} {hook.removeprefix('kernelforge_')}" for hook, names in status.contributions.items() if names
    )


def as_data(status: PluginStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "distribution": status.distribution,
        "version": status.version,
        "requires": status.requires,
        "state": status.state,
        "error": status.error,
        "seconds": status.seconds,
        "registers": {hook: list(names) for hook, names in status.contributions.items()},
    }
