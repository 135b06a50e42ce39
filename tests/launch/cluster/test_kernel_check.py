"""The kernel self-check, on the CPU; devices that compute wrong are played by patched kernels."""

import time

import pytest
import torch

from launch.cluster import kernel_check
from launch.cluster.kernel_check import kernel_faults

CPU = [torch.device("cpu")]


def test_a_sound_device_passes_and_is_kept_at_it_for_the_time_asked():
    began = time.monotonic()
    assert kernel_faults(CPU, 0.3) == []
    assert 0.3 <= time.monotonic() - began < 10


def flip_once(calls, change):
    """An attention that comes out wrong at one call, by one element."""
    original, count = kernel_check.attend, [0]

    def attend(*arguments):
        count[0] += 1
        result = original(*arguments)
        return change(result) if count[0] == calls else result

    return attend


def nudge(result):
    with torch.no_grad():
        result.view(-1)[7] = torch.nextafter(result.view(-1)[7], torch.tensor(9.0))
    return result


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (nudge, "the same attention came out differently"),
        (lambda result: result * float("nan"), "the same attention came out differently"),
        (lambda result: result.detach() + 0 * result + result * 0, "the same gradients"),
    ],
)
def test_one_wrong_bit_is_found_and_its_device_named(monkeypatch, change, fault):
    monkeypatch.setattr(kernel_check, "attend", flip_once(3, change))
    (found,) = kernel_faults(CPU, 5)
    assert found.startswith(f"cpu: {fault}")


def test_a_wrong_product_is_found(monkeypatch):
    def planted(self, device):
        original(self, device)
        self.expected[0, 0] += 1

    original = kernel_check._Probe.__init__
    monkeypatch.setattr(kernel_check._Probe, "__init__", planted)
    assert kernel_faults(CPU, 5) == ["cpu: a matrix product of whole numbers came out wrong"]


def test_a_device_that_fails_outright_is_a_fault_and_no_crash(monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore words")

    monkeypatch.setattr(kernel_check, "attend", lost)
    assert kernel_faults(CPU, 5) == ["cpu: CUDA error: uncorrectable ECC error encountered"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sound_cuda_devices_pass():
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    assert kernel_faults(devices, 3) == []
