import platform
import subprocess
import sys

import pytest

# In a process of its own: what other tests left in the heap would count too.
SCRIPT = """
import ctypes, psutil
from gnuq_serve.service.scorer.freed_memory import give_back

# Blocks too small for a mapping of their own, with one in between that keeps the heap from shrinking by itself.
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(64_000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 64_000)
kept = libc.malloc(64_000)
for block in blocks:
    libc.free(block)
before = psutil.Process().memory_info().rss
give_back()
print((before - psutil.Process().memory_info().rss) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory that way")
def test_freed_memory_goes_back():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 100
