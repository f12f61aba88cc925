"""By which arithmetic numbers are multiplied: set outright, so that no default of a version and no environment decides.

TF32 is a GPU's way to multiply fp32 numbers: of their 24 binary digits it takes 11. torch leaves it out of matrix
products and has it in convolutions, and environment variables change either.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {"bf16-residual": torch.bfloat16, "bf16-compiled": torch.bfloat16}  # see model/halves.py
HALVES = tuple(name for name, dtype in DTYPES.items() if dtype != torch.float32)
"""Precisions of 16 bits, to which weights and activations are rounded."""


def set_arithmetic() -> None:
    """Have a GPU multiply and sum at fp32, by kernels whose sums have one order; a CPU does so anyway."""
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)  # CUDA's libraries ask it when a process first uses them
    set_tf32(False, False)
    torch.backends.cudnn.benchmark = False  # would choose kernels by the clock
    torch.backends.cudnn.deterministic = True
    # At 16 bits: torch's own attention adds up gradients of texts in no one order, which cuDNN's was seen not to do.
    torch.backends.cuda.enable_cudnn_sdp(True)
    # Parts of a long sum of halves are added at fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def set_tf32(in_products: bool, in_convolutions: bool) -> None:
    """Whether a GPU computes matrix products, and convolutions, of fp32 numbers in TF32."""
    torch.set_float32_matmul_precision("high" if in_products else "highest")
    torch.backends.cudnn.allow_tf32 = in_convolutions


@contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    """Both in TF32, or neither, of what happens inside."""
    before = (torch.get_float32_matmul_precision() != "highest", torch.backends.cudnn.allow_tf32)
    if before == (is_on, is_on):
        yield
        return
    set_tf32(is_on, is_on)
    try:
        yield
    finally:
        set_tf32(*before)


@contextmanager
def own_attention() -> Iterator[None]:
    """Attention inside is by torch's own kernels: cuDNN plans anew for each width of texts, which only learning repays.

    What is encoded is the same each time by either.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def computed_at(precision: str, device: torch.device) -> Iterator[None]:
    """Products inside are computed at a precision ("tf32" on a CPU as fp32), whatever holds outside."""
    dtype, is_half = DTYPES[precision], precision in HALVES
    with tf32(precision == "tf32" and device.type == "cuda"), torch.autocast(device.type, dtype, is_half):
        yield
