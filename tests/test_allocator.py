import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from pyramid_ldm.allocator import keep_freed_memory
if sys.argv[1:]:
    sys.exit(print(keep_freed_memory()))
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)  # 64 MiB: 16384 pages, above glibc's threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = min(faults() for _ in range(8))
done = keep_freed_memory()
torch.ones(256 << 20, dtype=torch.uint8)  # room in the heap
print(done, before, min(faults() for _ in range(8)))
"""


def run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", **environment},
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_block_is_used_again_without_page_faults():
    done, before, after = run()
    if done == "False":
        pytest.skip("this C library is not glibc")
    assert int(after) < 100 < 1000 < int(before)  # 16384 of 4 KiB, or some dozen huge pages


def test_the_users_own_settings_are_left_alone():
    assert run("only call", MALLOC_TRIM_THRESHOLD_="1000")[0] == "False"
    assert run("only call", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"


FORK = """
import pathlib, torch
from pyramid_ldm.allocator import keep_freed_memory
from pyramid_ldm.data.loading import load_batches
class Sizes(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
done = keep_freed_memory()
torch.ones(512 << 20, dtype=torch.uint8)
held = Sizes()[0]
print(done, held, *next(load_batches(Sizes(), list, [[0]], workers=1)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_process_that_reads_data_does_not_hold_what_this_one_has_freed():
    words = [sys.executable, "-c", FORK]
    done, held, child = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    if done == "False":
        pytest.skip("this C library is not glibc")
    assert int(child) < int(held) - (500 << 20), "else every page of it is copied when it is used again"
