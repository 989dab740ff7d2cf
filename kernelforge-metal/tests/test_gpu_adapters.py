from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kernelforge.backend import Backend
from kernelforge.errors import DeviceError, UsageError
from kernelforge.registry import default_registry
from kernelforge.variant import INT8_ACTIVATIONS
from kernelforge_metal import adapters, backend
from kernelforge_metal.adapters import Adapter, from_wgpu, list_adapters
from kernelforge_metal.backend import GpuBackend, choose

INFO = {
    "device": "Card 7",
    "adapter_type": "DiscreteGPU",
    "backend_type": "Vulkan",
    "description": "driver 1.2",
    "vendor_id": 0x10DE,
    "device_id": 0x2335,
}


def card(*features: str, **changes: object) -> Adapter:
    known = {"shader-f16", "multiview", *features}
    return from_wgpu({**INFO, **changes}, known, {"max-buffer-size": 1 << 30, "max-bind-groups": 4})


def with_adapters(monkeypatch: pytest.MonkeyPatch, *found: Adapter) -> GpuBackend:
    monkeypatch.setattr(backend, "list_adapters", lambda: found)
    return GpuBackend()


def test_adapter_keeps_what_kernels_ask_for() -> None:
    info = card().info
    assert info.target == "gpu"
    assert info.name == "Card 7"
    assert info.features == {"shader-f16", "asynchronous", "dot4"}
    assert card(backend_type="Metal").info.features == {"shader-f16", "asynchronous"}
    assert info.limits == (("max-buffer-size", 1 << 30),)
    assert info.fingerprint == "gpu/Vulkan/10de:2335/Card 7/driver 1.2"


def test_activations_are_in_8_bits_where_the_gemv_that_quantises_them_runs() -> None:
    assert INT8_ACTIVATIONS in card("subgroup").info.features
    assert INT8_ACTIVATIONS not in card("subgroup", backend_type="Metal").info.features
    assert INT8_ACTIVATIONS not in card("subgroup", adapter_type="CPU").info.features


def test_software_adapters_are_marked_and_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    software = card(adapter_type="CPU", device="llvmpipe")
    assert "software" in software.info.features
    monkeypatch.setattr(
        adapters, "_ask_wgpu", lambda: [SimpleNamespace(info=a, features=(), limits=()) for a in (software, card())]
    )
    monkeypatch.setattr(adapters, "from_wgpu", lambda made, *_: made)
    list_adapters.cache_clear()
    try:
        assert [a.kind for a in list_adapters()] == ["discrete", "software"]
    finally:
        list_adapters.cache_clear()


def test_failing_wgpu_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Adapter]:
        raise OSError("no library")

    monkeypatch.setattr(adapters, "_ask_wgpu", fail)
    list_adapters.cache_clear()
    with pytest.raises(DeviceError, match="cannot list the GPU adapters: OSError: no library"):
        list_adapters()


def test_open_says_what_to_install_without_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = with_adapters(monkeypatch)
    assert gpu.devices() == ()
    with pytest.raises(DeviceError, match="there is no GPU adapter here") as caught:
        gpu.open()
    assert caught.value.hint is not None
    assert "--target cpu" in caught.value.hint


def test_an_adapter_is_chosen_by_name_or_part_of_it() -> None:
    first, second = card(), card(device="Other Card")
    software = card(adapter_type="CPU", device="llvmpipe")
    assert choose((first, second, software), None) is first
    assert choose((first, second, software), "other") is second
    assert choose((first, second, software), "Card 7") is first
    assert choose((first, second, software), "llvmpipe") is software
    assert choose((first, first), "card") is first
    with pytest.raises(UsageError, match="no device 'Card 8'"):
        choose((first,), "Card 8")
    with pytest.raises(UsageError, match="several devices of the gpu target are called 'card'"):
        choose((first, second), "card")


def test_plugin_registers_the_target() -> None:
    made: Backend = default_registry().backend("gpu")
    assert isinstance(made, GpuBackend)


def test_real_adapters() -> None:
    """Through wgpu and the machine's own driver, in a process of its own: nothing but the result may be printed."""
    code = (
        "from kernelforge_metal.adapters import list_adapters\nfor a in list_adapters(): print(a.name, a.kind, a.api)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    if not ran.stdout:
        pytest.skip("no GPU adapter here; on Debian and Ubuntu: apt install mesa-vulkan-drivers libvulkan1")
    assert ran.stderr == ""
    for line in ran.stdout.splitlines():
        assert line.split()[-1] in ("Metal", "Vulkan", "D3D12")
    for info in GpuBackend().devices():
        assert info.limit("max-storage-buffer-binding-size") >= 128 << 20
