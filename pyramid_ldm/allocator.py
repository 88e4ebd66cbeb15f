"""How this process's C library handles freed memory."""

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks for the next allocation instead of handing them back to the kernel.

    By default every block above 32 MiB is mapped afresh and returned when freed, so an activation of a large image
    costs a page fault every 4 KiB: element-wise operations then run at a quarter of their speed. The process keeps
    its peak memory until it ends. Belongs at the start of a program; has no effect on GPU memory.

    Returns whether it did anything: not off glibc, and not where the user set MALLOC_* variables.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        if "CS_GNU_LIBC_VERSION" not in os.confstr_names or not os.confstr("CS_GNU_LIBC_VERSION"):
            return False
        library = ctypes.CDLL(None)
        return bool(library.mallopt(M_MMAP_THRESHOLD, 1 << 30)) and bool(library.mallopt(M_TRIM_THRESHOLD, -1))
    except (AttributeError, OSError, ValueError):
        return False


def return_freed_memory() -> None:
    """Hands freed blocks back to the kernel after all. Belongs before a fork: as long as the child lives, what is
    written into a block that both hold is copied first, page by page."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
