"""A GPU's kernels of the picture encoders, recorded once and played back in every step: CUDA graphs.

A step of few pairs is thousands of short kernels, each of which a GPU has done before the host has launched the next.
Played back, those of an encoder are one launch for forward and one for backward. A recording is of one size: pictures
are padded to two a pair, and what is said of the padding is dropped.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tongkuan.model.trunk import ItemModel
from tongkuan.ranks.arithmetic import DTYPES, HALVES, computed_at
from tongkuan.settings import Precision

Forward = Callable[[Tensor], Tensor]


def record_encoders(model: ItemModel, count: int, side: int, precision: Precision, device: torch.device) -> None:
    """Have the picture encoders, where they learn, play back what is recorded now of `count` pictures.

    Nothing else may use the GPU meanwhile, nor pin memory for it. Generators are left as they were.
    """
    encoders = model.encoders("image")
    plain: list[Forward] = [encoder.forward for encoder in encoders]
    images = torch.zeros(count, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    was_training = model.training
    model.train()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        computed_at(precision, device),
        # Kept casts of weights would be those of now for ever.
        torch.autocast(device.type, DTYPES[precision], precision in HALVES, cache_enabled=False),
    ):
        # Autograd keeps to the recording's stream, and would say at every run that it must wait for it.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        torch.cuda.make_graphed_callables(tuple(encoders), ((images,),) * len(encoders), allow_unused_input=True)
    model.train(was_training)
    for encoder, forward in zip(encoders, plain, strict=True):
        encoder.forward = padded(encoder, encoder.forward, forward, count)


def padded(encoder: nn.Module, play: Forward, plain: Forward, count: int) -> Forward:
    """`play` of up to `count` pictures where the encoder learns; else, and of more, `plain`."""

    def forward(images: Tensor) -> Tensor:
        """Pictures float (N, 3, S, S) -> features float (N, F)."""
        missing = count - len(images)
        if not encoder.training or not torch.is_grad_enabled() or missing < 0:
            return plain(images)
        whole = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        return play(whole.contiguous(memory_format=torch.channels_last))[: len(images)]

    return forward
