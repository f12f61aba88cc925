"""Blocks of an encoder, counted from its input: which of them learn, and how fast.

A block is a transformer layer, or what timm calls one: a layer of a ViT or a Swin, a residual block of a convolutional
network. What follows the last block (a norm, a last convolution) counts as part of it.
"""

from torch import nn

from tongkuan.base.errors import UserError
from tongkuan.model.trunk import ItemModel
from tongkuan.settings import TrainSettings

FOLLOWS = 99_999  # timm's sign for what belongs to the block before


def block_numbers(encoder: nn.Module) -> dict[str, int]:
    """By each parameter's name its block from 1 on, 0 for what precedes the first.

    LookupError when the network does not tell.
    """
    numbers = image_blocks(encoder) if hasattr(encoder, "group_matcher") else text_blocks(encoder)
    if not max(numbers.values()):
        raise LookupError
    return numbers


def text_blocks(encoder: nn.Module) -> dict[str, int]:
    """Of a transformers network: its list of layers is the outermost one that is as long as it has layers."""
    count = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    lists = ((name, each) for name, each in encoder.named_modules() if isinstance(each, nn.ModuleList))
    prefix = next((f"{name}." for name, each in lists if len(each) == count), None)
    if prefix is None:
        raise LookupError
    numbers, number = {}, 0
    for name, _ in encoder.named_parameters():  # in the order in which the network was put together
        if name.startswith(prefix):
            number = int(name.removeprefix(prefix).partition(".")[0]) + 1
        numbers[name] = number
    return numbers


def image_blocks(encoder: nn.Module) -> dict[str, int]:
    """Of a timm network, by its own account."""
    from timm.models import group_parameters

    try:
        matcher = encoder.group_matcher(coarse=False)  # type: ignore[operator]
    except Exception as error:  # of networks that have no account, timm raises what each one's author chose
        raise LookupError from error
    if not isinstance(matcher, dict):
        raise LookupError
    # timm would count what its account leaves out, such as a norm behind the pooling, as a block of its own.
    numbers: dict[str, int] = group_parameters(encoder, {**matcher, "rest": [("", (FOLLOWS,))]}, reverse=True)
    return numbers


def numbered(kind: str, encoder: nn.Module, setting: str) -> dict[str, int]:
    """block_numbers, or a UserError that says which setting asks in vain."""
    try:
        return block_numbers(encoder)
    except LookupError as error:
        raise UserError(
            f"{setting}: the {kind} encoder ({type(encoder).__name__}) does not tell its blocks; leave it out, or take "
            "another encoder"
        ) from error


def freeze(model: ItemModel, settings: TrainSettings) -> None:
    """Leave as they are the encoders' parameters that settings.encoders does not name: no gradient is computed.

    UserError when an encoder has fewer blocks than are to learn.
    """
    if (count := settings.trained_blocks) is None:
        return
    encoders = [(kind, encoder) for kind in ("text", "image") for encoder in model.encoders(kind)]
    if not count:
        for _, encoder in encoders:
            encoder.requires_grad_(False)
        return
    setting = f"train.encoders={settings.encoders}"
    found = [(kind, encoder, numbered(kind, encoder, setting)) for kind, encoder in encoders]
    depths = {kind: max(numbers.values()) for kind, _, numbers in found}
    if any(depth < count for depth in depths.values()):
        has = " and ".join(f"the {kind} encoder has {depth}" for kind, depth in depths.items())
        raise UserError(f"{setting}: {count} blocks are to learn, but {has}; name at most last-{min(depths.values())}")
    for kind, encoder, numbers in found:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(numbers[name] > depths[kind] - count)
