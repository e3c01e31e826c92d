"""GPUs as nvidia-smi shows them; a stand-in on PATH gives a machine's shape."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from raylaunch.cluster.local.gpus import GpuChoice, choose_gpus, detect_gpus, parse_gpus
from raylaunch.errors import ClusterStartError, SpecError
from raylaunch.models.cluster_spec import ClusterSpec

ROWS = """\
0, GPU-aaaa1111-0000, NVIDIA H100 80GB HBM3, 81559
1, GPU-bbbb2222-0000, NVIDIA H100 80GB HBM3, 81559
"""
SPARK = "0, GPU-cccc3333-0000, NVIDIA GB10, [N/A]"


def nvidia_smi(folder: Path, *, rows: str = ROWS, status: int = 0) -> Path:
    """Put a stand-in for nvidia-smi into `folder`, which a test puts on its PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{rows.strip()}'\nexit {status}\n")
    program.chmod(0o755)
    return program


def test_a_machine_without_nvidia_smi_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert anyio.run(detect_gpus) == []


def test_gpus_are_read_with_names_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    first, second = anyio.run(detect_gpus)
    assert (first.index, first.uuid, first.name) == ("0", "GPU-aaaa1111-0000", "NVIDIA H100 80GB HBM3")
    assert first.memory_total == 81559 * 1024 * 1024
    assert second.index == "1"


def test_unavailable_memory_is_none_and_not_zero() -> None:
    (gpu,) = parse_gpus(SPARK)
    assert gpu.memory_total is None


def test_a_driver_that_does_not_work_is_an_error_and_not_a_machine_without_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, rows="Failed to initialize NVML: Driver/library version mismatch", status=18)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterStartError) as caught:
        anyio.run(detect_gpus)
    assert caught.value.message == (
        "nvidia-smi failed with exit status 18: Failed to initialize NVML: Driver/library version mismatch"
    )


def test_no_devices_is_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, rows="No devices were found", status=6)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert anyio.run(detect_gpus) == []


def test_auto_uses_all_gpus() -> None:
    choice = choose_gpus(ClusterSpec(), parse_gpus(ROWS), {})
    assert (choice.count, choice.visible, choice.logical) == (2, "0,1", False)


def test_auto_keeps_to_the_gpus_that_the_environment_leaves_visible() -> None:
    choice = choose_gpus(ClusterSpec(), parse_gpus(ROWS), {"CUDA_VISIBLE_DEVICES": "1"})
    assert choice.uuids == ("GPU-bbbb2222-0000",)


def test_a_list_of_ids_or_uuids_limits_which_gpus_are_used() -> None:
    by_id = choose_gpus(ClusterSpec(gpus=("1",)), parse_gpus(ROWS), {})
    by_uuid = choose_gpus(ClusterSpec(gpus=("GPU-bbbb2222-0000",)), parse_gpus(ROWS), {})
    assert by_id == by_uuid
    assert by_id.visible == "1"


def test_a_number_states_logical_gpus() -> None:
    assert choose_gpus(ClusterSpec(gpus=4), parse_gpus(ROWS), {}) == GpuChoice(count=4, logical=True)


def test_a_listed_gpu_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(SpecError) as caught:
        choose_gpus(ClusterSpec(gpus=("7",)), parse_gpus(ROWS), {})
    assert caught.value.message == (
        "gpus: this machine has no GPU '7'; it has 0 (NVIDIA H100 80GB HBM3, 80 GiB, GPU-aaaa1111-0000), "
        "1 (NVIDIA H100 80GB HBM3, 80 GiB, GPU-bbbb2222-0000)"
    )


def test_a_listed_gpu_on_a_machine_without_any_is_refused() -> None:
    with pytest.raises(SpecError, match=r"this machine has no GPU '0'; it has none \(no nvidia-smi found\)"):
        choose_gpus(ClusterSpec(gpus=("0",)), [], {})


def test_a_gpu_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(SpecError, match=r"GPU 1 is listed twice \('GPU-bbbb2222-0000'\)"):
        choose_gpus(ClusterSpec(gpus=("1", "GPU-bbbb2222-0000")), parse_gpus(ROWS), {})
