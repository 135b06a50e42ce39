import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading, torch
from zeta.run.cpu_tuning import keep_freed_memory
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(30):
    if step == 20:  # by then the heap has found its layout
        before = faults()
    {allocate}
print(faults() - before)
"""


HERE = "a, b = torch.ones(8 << 20), torch.ones(8 << 20); del a, b"  # 32 MiB each
IN_A_THREAD = "t = threading.Thread(target=torch.ones, args=[8 << 20]); t.start(); t.join()"


def page_faults(call, allocate):
    command = [sys.executable, "-c", PROGRAM.format(call=call, allocate=allocate)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize("allocate", [HERE, IN_A_THREAD])
def test_the_memory_of_freed_tensors_is_used_again_without_page_faults(allocate):
    assert page_faults("keep_freed_memory()", allocate) < page_faults("", allocate) / 4
