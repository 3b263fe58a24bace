"""Several processes: what PyTorch keeps of their group."""

import subprocess
import sys

import pytest

SCRIPT = """
import glob, sys, time
import glora
import torch

def threads():
    return [name for name in (open(file).read() for file in glob.glob("/proc/self/task/*/comm")) if "gloo" in name]

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
if sys.argv[2] == "after":
    torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
glora.inject(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
assert threads()
torch.distributed.destroy_process_group()
deadline = time.monotonic() + 5
while threads() and time.monotonic() < deadline:
    time.sleep(0.05)
print(threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have names in /proc")
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_group_ends_whatever_was_loaded_first(tmp_path, order):
    """``glora`` is first used once there is a group: before or after the first optimiser."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "store"), order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
