from __future__ import annotations

import pytest

from kernelforge.plugins import load_registry
from kernelforge.roofline import device_roofline
from kernelforge.session import Session
from kernelforge_metal import roofline


def test_the_limits_of_a_device_are_measured_and_kept(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "BYTES", 1 << 22)
    monkeypatch.setattr(roofline, "ROUNDS", 2)
    found = device_roofline(gpu.device, load_registry())
    assert found is not None
    assert 1e7 < found.device.bytes_s < 1e14
    assert 1e8 < found.device.flops < 1e15
    assert found.thread is None
    assert found.timing_source in ("timestamp-query", "host-slope")
    monkeypatch.setattr(roofline, "measure", None)
    assert device_roofline(gpu.device, load_registry()) == found


def test_arithmetic_counts_what_it_does() -> None:
    text = roofline.multiplying_shader()
    assert text.count("fma(") == 4 * roofline.SUMS
    assert f"i < {roofline.PASSES // 4}u" in text
    assert f"i < {1 << 20}u" in roofline.reading_shader(1 << 20)
