"""The state dict in a checkpoint as people save them: what it is wrapped in, what its keys are prefixed with.

Tensors are looked at, never read or copied: a checkpoint of gigabytes may be mapped from its file.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from tongkuan.base.errors import UserError, clip

# The entry's networks: the first step of each of its keys.
ROOTS = re.compile(r"(txt_encoder|img_encoder|fc)[12]\Z")
# Steps that DDP, torch.compile, FSDP, recomputed blocks and a class around the network put in a key, anywhere.
STEPS = {"module", "_orig_mod", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OLD_NORM = re.compile(r"(?i)(norm\w*\.)(gamma|beta)\Z")  # as TensorFlow called a LayerNorm's weight and bias
PRESENT = {"gamma": "weight", "beta": "bias"}
DEPTH = 4  # dictionaries within one another that are looked into


def unwrap(content: object, shown: Path) -> tuple[dict[str, Tensor], str]:
    """(tensors of the one state dict in a loaded checkpoint by the entry's own keys, a note on others or nothing).

    `params` at the top is the one when it holds a state dict, as in the released files. UserError when there is no
    state dict of the entry, when there are several, or when two keys differ by wrappers alone.
    """
    found = dict(state_dicts(content))
    place = "params" if "params" in found else next(iter(found), None)
    if place is None:
        raise UserError(
            f'{shown}: no {{"params": state_dict}} nor a state_dict with fc1., txt_encoder1. and so on in it, found '
            f"{described(content)}; name the released checkpoint"
        )
    others = [other for other in found if other != place and not same_tensors(found[other], found[place])]
    how = "torch.save(torch.load(FILE, weights_only=True){}, OUT)"
    if others and place != "params":
        names = ", ".join(f"{clip(name)} ({len(found[name])} tensors)" for name in (place, *others))
        advice = f"save the one that is meant as a file of its own: {how.format(lookup(others[0]))}"
        raise UserError(f"{shown}: {1 + len(others)} state dicts in it, {names}; {advice}")
    note = ""
    if others:
        names = ", ".join(map(clip, others))
        note = f"note: {shown}: took 'params', left {names}; if that is meant: {how.format(lookup(others[0]))}"
    return renamed(found[place], shown), note


def lookup(place: str) -> str:
    """Python that goes from a checkpoint to the state dict at a place."""
    return "".join(f"[{key!r}]" for key in place.split("/"))


def state_dicts(content: object, place: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(keys on the way to it, joined by /; its tensors) of each dictionary that holds some of the entry's tensors."""
    if not isinstance(content, Mapping):
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if any(ROOTS.match(step) for key in tensors for step in key.split(".")):
        yield place, tensors
        return
    for key, value in content.items() if depth else ():
        if isinstance(key, str):
            yield from state_dicts(value, f"{place}/{key}" if place else key, depth - 1)


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are one and the same, saved under two names."""
    return one.keys() == other.keys() and all(
        one[key].data_ptr() == other[key].data_ptr() and one[key].shape == other[key].shape for key in one
    )


def described(content: object) -> str:
    """The top-level keys of a checkpoint, the first few, or what it is instead."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [clip(key, 30) for key in list(content)[:6]]
    return f"the keys {', '.join(keys)}{', …' if len(content) > len(keys) else ''}" if keys else "nothing"


def renamed(tensors: Mapping[str, Tensor], shown: Path) -> dict[str, Tensor]:
    """Tensors by the entry's keys: without wrappers' steps, and without a prefix that all of them have."""
    steps_of = {key: [step for step in key.split(".") if step not in STEPS] or [key] for key in tensors}
    while all(len(steps) > 1 and steps[0] == next(iter(steps_of.values()))[0] for steps in steps_of.values()):
        if ROOTS.match(next(iter(steps_of.values()))[0]):
            break
        steps_of = {key: steps[1:] for key, steps in steps_of.items()}
    named: dict[str, str] = {}
    for key, steps in steps_of.items():
        name = OLD_NORM.sub(lambda found: found[1] + PRESENT[found[2].lower()], ".".join(steps))
        if (other := named.setdefault(name, key)) != key:
            raise UserError(
                f"{shown}: the keys {clip(other, 90)} and {clip(key, 90)} are both {clip(name, 90)} without what "
                "wrappers add; keep one of them and save the state dict again"
            )
    return {name: tensors[key] for name, key in named.items()}
