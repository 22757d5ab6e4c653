"""Set up a process that runs engines: threads, memory, rounding.

Imports PyTorch only when called, so that a process can import this file first and choose how PyTorch is imported.
"""

import ctypes
import sys


def set_up(gpu: bool, threads: int) -> None:
    """Import what engines need and set PyTorch up for them.

    Args:
        gpu: the networks run on a GPU.
        threads: CPU threads of PyTorch.
    """
    import torch

    import glad_core.engine.engine  # noqa: F401  (here, so that one call imports everything an engine needs)

    torch.set_num_threads(threads)
    if not gpu:
        keep_buffers()
    # TF32 rounds differently for every batch shape; an image's score must not depend on its neighbours.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_buffers() -> None:
    """Let the C library keep the memory of large tensors between calls, for a process whose CPU runs the networks.

    glibc returns every buffer above 32 MB to the system and takes it again, page by page, at the next call: about 4 %
    of a small model's time. The setting holds for the whole process and for threads started later; the process then
    stays as large as it was at its largest. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_mmap_threshold, m_trim_threshold, m_arena_max, m_top_pad = -3, -1, -8, -2  # malloc.h
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**31 - 1)
        # A thread may have its own memory, in pieces of 64 MB. Allow no more of those; a piece is returned only when
        # this much is free below it, so it never is.
        mallopt(m_arena_max, 1)
        mallopt(m_top_pad, 2**26)
