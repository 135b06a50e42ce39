import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from zeta.host_memory import keep_freed_memory
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(30):
    if step == 20:  # by then the heap has found its layout
        before = faults()
    a, b = torch.ones(8 << 20), torch.ones(8 << 20)  # 32 MiB each
    del a, b
print(faults() - before)
"""


def page_faults(call):
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_the_memory_of_freed_tensors_is_used_again_without_page_faults():
    assert page_faults("keep_freed_memory()") < page_faults("") / 4
