"""What the processor can do, and how memory is best asked of the system for it."""

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
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


def available_cores(root: Path = Path("/")) -> int:
    """Processors this process may use at a time: those it may run on, less where a container's quota gives it less.

    `root` is where proc/ and sys/ lie. `docker run --cpus 2` on 64 cores is such a quota: with 64 threads it would be
    used up at once, and all would stand still for the rest of each period.
    """
    return max(1, int(min([float(len(os.sched_getaffinity(0))), *cpu_quotas(root)])))


def cpu_quotas(root: Path) -> Iterator[float]:
    """Processors that each control group of this process, and each around it, may use at a time; none unlimited."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    # hierarchy:controllers:path; version 2 names no controllers
    paths = {frozenset(names.split(",")): path for _, names, path in (line.split(":", 2) for line in groups)}
    for line in mounts:
        fields, _, after = line.partition(" - ")
        _, _, _, top, place, *_ = map(unescape, fields.split(" "))
        kind, _, options = after.split(" ", 2)
        wanted = "" if kind == "cgroup2" else "cpu"
        if kind not in ("cgroup", "cgroup2") or (wanted and wanted not in options.split(",")):
            continue
        path = next((path for names, path in paths.items() if wanted in names), "/")
        # A container may see its own group as the top, or the host's path to it where only its own group is mounted.
        steps = PurePosixPath(path).relative_to(top).parts if PurePosixPath(path).is_relative_to(top) else ()
        folder = root / place.lstrip("/")
        for step in ("", *(() if ".." in steps else steps)):
            folder /= step
            if (quota := quota_of(folder)) is not None:
                yield quota


def quota_of(folder: Path) -> float | None:
    """Processors' worth of time that a control group has in each period, by either version's files."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # "max" is no number
        return None


def unescape(field: str) -> str:
    """A field of mountinfo as it is meant: blanks stand there in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


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
    """Whether matrices of `precision` ("fp32", "tf32", "bf16…", "fp16") are multiplied by instructions made for them.

    A CPU without them gets there number by number: a hundred times slower than fp32. GPUs have had bf16 and TF32 since
    Ampere, and fp16 for longer.
    """
    if precision == "fp32":
        return True
    import torch

    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in HALF_INSTRUCTIONS.get(precision.split("-")[0], ()))


def keep_freed_memory(device: "torch.device | None" = None) -> None:
    """Let this process keep what it frees for its next tensors.

    By default glibc gives tensors of megabytes back to the system at once and has every page of the next ones zeroed
    anew: a tenth of the time of an encoder on a CPU, 40 % of that of preparing pictures. Without glibc nothing changes.
    Where `device` is a GPU, threads that decode keep arenas of their own: they would wait for the one that launches.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if device is None or device.type == "cpu":
        mallopt(M_ARENA_MAX, 1)  # threads' own arenas are too small for tensors and give them back all the same


if __name__ == "__main__":  # for shells
    print(available_cores())
