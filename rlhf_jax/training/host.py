"""The processes a run lives in."""

import ctypes
import os
import platform
import re

import jax
import numpy as np
from jax.experimental import multihost_utils


def all_processes_agree(ok: bool) -> bool:
    """Whether it is so in every process; all of them must ask."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


_OF_A_COLLECTIVE = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE|[Bb]arrier|oordination")


def of_several(error: BaseException) -> bool:
    """Whether what several processes do together failed, as when another has ended.

    XLA and Orbax raise that as JaxRuntimeError or ValueError: its text tells.
    """
    return (
        jax.process_count() > 1
        and isinstance(error, jax.errors.JaxRuntimeError | ValueError)
        and _OF_A_COLLECTIVE.search(str(error)) is not None
    )


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, which makes steps on a CPU much faster.

    A training step frees and allocates hundreds of megabytes; handing them back to the
    kernel costs more than some of the arithmetic. Resident memory grows in exchange.
    `RLHF_JAX_KEEP_MEMORY=0` turns it off; other systems than Linux are left alone.
    """
    if platform.system() != "Linux" or os.environ.get("RLHF_JAX_KEEP_MEMORY") == "0":
        return
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 256 * 2**20)
    libc.mallopt(m_arena_max, 1)
