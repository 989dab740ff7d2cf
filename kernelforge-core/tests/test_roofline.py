"""The limits of a device: their arithmetic, and how they are kept. What measures them is a stand-in that counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugin_dist import Site

from kernelforge.backend import Device
from kernelforge.descriptors import BackendSpec
from kernelforge.errors import PluginError
from kernelforge.hookspecs import hookimpl
from kernelforge.op import Cost
from kernelforge.plugins import load_registry
from kernelforge.reference import ReferenceBackend
from kernelforge.registry import Registry
from kernelforge.roofline import (
    STANDING_HEADERS,
    Peaks,
    Roofline,
    Standing,
    device_roofline,
    kept_roofline,
    standing_cells,
    standing_data,
)
from kernelforge.selection import NO_RECORDS
from kernelforge.session import Session

LIMITS = Roofline(Peaks(20e9, 100e9, 400e9), Peaks(15e9, 50e9, 200e9))


def registry(measure: Callable[[Device], Any] | None) -> Registry:
    """One with the target `counted`: the reference under another name."""
    spec = BackendSpec("counted", ReferenceBackend, roofline=measure)
    return load_registry(extra_plugins=[SimpleNamespace(kernelforge_backends=hookimpl(lambda: [spec]))])


class Opened:
    """A device of the target `counted`."""

    def __init__(self, fingerprint: str = "a") -> None:
        self.info = replace(ReferenceBackend().open().info, target="counted", fingerprint=fingerprint)


def test_where_work_stands() -> None:
    streamed = LIMITS.standing(Cost(flops=10**9, bytes=10**9), seconds=0.1)
    assert (streamed.memory, streamed.compute) == pytest.approx((0.5, 0.1))
    assert streamed.limit == "memory"
    assert streamed.least == pytest.approx(0.05)
    reused = LIMITS.standing(Cost(flops=10**10, bytes=10**9), seconds=0.2)
    assert (reused.memory, reused.compute) == pytest.approx((0.25, 0.5))
    assert reused.limit == "compute"
    assert reused.least == pytest.approx(0.1)


def test_where_work_stands_as_data_and_cells() -> None:
    at = Standing(memory=1.234567, compute=0.05, limit="memory", least=1.0)
    assert standing_data(at) == {"of_bandwidth": 1.235, "of_peak": 0.05, "limit": "memory"}
    assert standing_cells(at) == ["123%", "5%", "memory"]
    assert standing_data(None) == {"of_bandwidth": None, "of_peak": None, "limit": None}
    assert standing_cells(None) == ["", "", ""]
    assert len(STANDING_HEADERS) == len(standing_cells(at))


@pytest.mark.parametrize("bad", [(0.0, 1.0), (1.0, -1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, 1.0, 0.0)])
def test_limits_are_positive_numbers(bad: tuple[float, ...]) -> None:
    with pytest.raises(PluginError, match="a roofline needs positive numbers"):
        Peaks(*bad)


def test_limits_as_data_and_words() -> None:
    assert Roofline.from_data(json.loads(json.dumps(LIMITS.as_data()))) == LIMITS
    lean = Roofline(Peaks(1e9, 2e9), timing_source="timestamp-query")
    assert Roofline.from_data(lean.as_data()) == lean
    assert str(lean) == "memory 1.0 GB/s, f32 2 GFLOP/s"
    assert str(LIMITS).endswith("int8 400 Gop/s (one thread: memory 15.0 GB/s, f32 50 GFLOP/s, int8 200 Gop/s)")


def test_they_are_measured_once_for_each_device() -> None:
    measured: list[str] = []

    def measure(device: Device) -> Roofline:
        measured.append(device.info.fingerprint)
        return replace(LIMITS, device=Peaks(1e9 * len(measured), 1e9))

    plugins = registry(measure)
    one, other = Opened("a"), Opened("b")
    assert kept_roofline(one.info) is None
    first = device_roofline(one, plugins)  # type: ignore[arg-type]  # its info is all that is asked for
    assert device_roofline(one, plugins) == first == kept_roofline(one.info)  # type: ignore[arg-type]
    assert device_roofline(other, plugins) != first  # type: ignore[arg-type]
    assert measured == ["a", "b"]
    again = device_roofline(one, plugins, again=True)  # type: ignore[arg-type]
    assert again == kept_roofline(one.info) != first
    assert measured == ["a", "b", "a"]


def test_a_damaged_or_unwritable_file_is_measured_anew(own_home: Path) -> None:
    plugins, device = registry(lambda device: LIMITS), Opened()
    assert device_roofline(device, plugins) == LIMITS  # type: ignore[arg-type]
    (file,) = (own_home / "cache" / "roofline").iterdir()
    for text in ("{", "[]", '{"format": 1}', '{"format": 0}', '{"format": 1, "roofline": {"device": {"flops": 1}}}'):
        file.write_text(text)
        assert kept_roofline(device.info) is None, text
        assert device_roofline(device, plugins) == LIMITS, text  # type: ignore[arg-type]
        assert kept_roofline(device.info) == LIMITS, text
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    assert device_roofline(device, plugins) == LIMITS  # type: ignore[arg-type]


def test_a_target_need_not_offer_them() -> None:
    assert device_roofline(Opened(), registry(None)) is None  # type: ignore[arg-type]
    with Session("reference", records=NO_RECORDS) as session:
        assert session.roofline() is None


def test_what_is_no_roofline_is_refused() -> None:
    with pytest.raises(PluginError, match="the roofline of target 'counted' is 7, wants a Roofline"):
        device_roofline(Opened(), registry(lambda device: 7))  # type: ignore[arg-type]


PLUGIN = """
from dataclasses import replace
from kernelforge.reference import INFO, ReferenceBackend, ReferenceDevice
from kernelforge.roofline import Peaks, Roofline

def measure(device):
    return {result}

class Device(ReferenceDevice):
    info = replace(INFO, target="timed")

class Backend(ReferenceBackend):
    def devices(self):
        return [Device.info]

    def open(self, device=None, *, threads=None):
        return Device()

@hookimpl
def kernelforge_backends():
    return [BackendSpec("timed", Backend, roofline=measure)]
"""


def test_the_doctor_shows_them(site: Site) -> None:
    site.add("timed", PLUGIN.format(result="Roofline(Peaks(3e9, 7e9))"))
    envelope = site.run_json("doctor", "--target", "timed")
    assert list(envelope["data"]["devices"]) == ["timed"]
    assert envelope["data"]["devices"]["timed"][0]["roofline"]["device"]["bytes_s"] == 3e9
    assert "at most: memory 3.0 GB/s, f32 7 GFLOP/s\n" in site.run("doctor").stdout


def test_the_doctor_goes_on_when_they_cannot_be_measured(site: Site) -> None:
    site.add("timed", PLUGIN.format(result="1 / 0"))
    ran = site.run("doctor", "--measure")
    assert ran.returncode == 0
    assert "problem: the limits of timed (numpy) cannot be measured: ZeroDivisionError" in ran.stdout


def test_the_doctor_knows_the_target(site: Site) -> None:
    ran = site.run("doctor", "--target", "nope")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "error: unknown target 'nope'" in ran.stderr
    site.add(
        "bare",
        """
class Backend:
    def devices(self): return []

@hookimpl
def kernelforge_backends(): return [BackendSpec("bare", Backend)]
""",
    )
    ran = site.run("doctor", "--target", "bare")
    assert ran.returncode == 11
    assert "error: target 'bare' has no device here" in ran.stderr
