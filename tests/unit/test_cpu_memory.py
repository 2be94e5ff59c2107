"""Memory that training on a CPU frees is not given back to the kernel, to be mapped anew in the next step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from megatron_hc.cpu_memory import keep_freed_memory

STEPS = """
import resource
import torch
from megatron_hc.cpu_memory import keep_freed_memory
print(keep_freed_memory())

def step():
    held = [torch.ones(numbers) for numbers in (1 << 20, 1 << 22, 1 << 16) for _ in range(3)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
step()
before = faults()
for _ in range(5):
    step()
print((faults() - before) // 5)
"""


def run(**variables: str) -> tuple[bool, int]:
    """Whether memory is kept, and page faults per step."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))}
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_unless_the_user_has_said_how() -> None:
    kept, few = run()
    assert kept
    kept, many = run(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept
    assert many > 10_000  # some 60 MB are touched in each step, in pages of 4 KiB
    assert few < 100


def test_the_users_own_settings_stay() -> None:
    assert not keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"})
