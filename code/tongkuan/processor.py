"""What the processor can do, and how memory is best asked of the system for it."""

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # the verbs that prepare pictures work without

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc takes no more

HALF_INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "avx10_1", "bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16"),
}


def available_cores() -> int:
    """Processors this process may use (a container's limit counts where the kernel shows it)."""
    return len(os.sched_getaffinity(0))


def processor_of(device: "torch.device") -> str:
    """What computes: another GPU or CPU takes other kernels, which round otherwise."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line for line in lines if line.startswith("model name")), "")
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} {name}"


def multiplies(precision: str, device: "torch.device") -> bool:
    """Whether matrices of `precision` ("fp32", "bf16", "fp16") are multiplied by instructions made for them.

    A CPU without them gets there number by number: a hundred times slower than fp32.
    """
    if precision == "fp32" or device.type != "cpu":
        return True
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in HALF_INSTRUCTIONS[precision])


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next tensors.

    By default glibc gives tensors of megabytes back to the system at once and has every page of the next ones zeroed
    anew: a tenth of the time of an encoder on a CPU, 40 % of that of preparing pictures. Without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_ARENA_MAX, 1)  # threads' own arenas are too small for tensors and give them back all the same
