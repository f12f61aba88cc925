"""One tower: what an item is read by, as parts that are joined under one embedding.

Each part is a vector of norm 1, or 0 where an item lacks it, times a learned scale; so q_a.q_b is the weighted sum of
the parts' cosines. p says that a part is there: a constant is taken away where both sides have it, so that a pair of
which one side lacks it is judged by what is left. Keys likewise: equal values add, different ones take away. Listings
that are like many others are asked for more likeness.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from tongkuan.model.colour import OBJECT_WIDTH, WHOLE_WIDTH, object_colours, whole_colours
from tongkuan.model.trunk import ItemModel, Trunk, constant
from tongkuan.records.words import BUCKETS, KINDS
from tongkuan.settings import ModelSettings

MASK = (1 << 31) - 1
TEXT_STATES = 2  # of a text: of [CLS], and the mean of all tokens'
CROPPED = 0.25  # of each side, in the view of the middle
EMPTY_TEXT = 2  # tokens: [CLS] and [SEP]


class Projection(nn.Module):
    """Raw features of a part -> a vector of one norm."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(width, size)
        self.scale = nn.Parameter(torch.ones(()))
        """Square root of the part's weight."""
        self.lack = nn.Parameter(torch.zeros(()))
        """Square root of what is taken away where both sides have the part."""

    def forward(self, features: Tensor) -> Tensor:
        """float (N, width), rows of 0 where there is none -> (N, size)."""
        return normalize(self.linear(features), dim=1) * has_any(features) * self.scale


class Words(nn.Module):
    """Hashed words of an item -> one vector: by tf-idf within each kind and each key, weighed, then sketched.

    The sketch adds each word to one of `size` numbers with a sign of its own (Charikar et al. 2002); it keeps inner
    products up to 1 / sqrt(size) of the norms. Keys get a slot each, those that training found common.
    """

    def __init__(self, size: int, slots: int) -> None:
        super().__init__()
        self.size = size
        self.idf: Tensor
        self.generic: Tensor
        self.group_of: Tensor
        self.register_buffer("idf", torch.ones(BUCKETS))
        self.usual: Tensor
        self.register_buffer("generic", torch.zeros(BUCKETS))
        """What a word of unit weight says of how common the item is: the mean training item, weighed by kind."""
        self.register_buffer("usual", torch.zeros(len(KINDS)))
        """How common the words of each kind mostly are: taken away where the item has the kind."""
        groups = torch.full((len(KINDS) + BUCKETS,), -1, dtype=torch.int64)
        groups[: len(KINDS)] = torch.arange(len(KINDS))
        self.register_buffer("group_of", groups)
        """By owner: its kind, or len(KINDS) + the slot of its key; -1 where the key has none."""
        self.scales = nn.Parameter(torch.ones(len(KINDS) + slots))
        """Square roots of the weights of kinds and slots."""
        self.lack = nn.Parameter(torch.zeros(len(KINDS) + slots))
        """Square roots of what is taken away where both sides have a kind or a key."""

    def forward(self, buckets: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 (N, G) each, owners -1 where there is no word -> q's part, p's part, how common.

        float (N, size), (N, kinds + slots), (N, 1).
        """
        groups = torch.where(owners >= 0, self.group_of[owners.clamp(min=0)], -1)  # (N, G)
        place, there = groups.clamp(min=0), (groups >= 0).float()
        weight = self.idf[buckets] * there
        squares = sums(weight.square(), place, len(self.scales))
        unit = weight / squares.gather(1, place).clamp(min=1e-12).sqrt()
        mixed = mix(buckets)
        signed = unit * self.scales[place] * (1.0 - 2.0 * (mixed & 1))
        sketch = sums(signed, (mixed >> 1) % self.size, self.size)
        has = (squares > 0).float()
        common = (unit * self.generic[buckets]).sum(dim=1) - has[:, : len(KINDS)] @ self.usual
        return sketch, has * self.lack, common.unsqueeze(1)


def sums(values: Tensor, place: Tensor, size: int) -> Tensor:
    """float (N, G) and int64 (N, G) -> (N, size): the sum of the values of each place."""
    if values.device.type != "cuda":
        return values.new_zeros(values.shape[0], size).scatter_add(1, place, values)
    return sums_in_order(values, place, size)  # a GPU's scatter_add adds as it comes: each time other last bits


def sums_in_order(values: Tensor, place: Tensor, size: int) -> Tensor:
    """As `sums`; on a GPU sorted by place and added from first to last."""
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1).expand_as(place)
    return values.new_zeros(values.shape[0], size).index_put((rows, place), values, accumulate=True)


def mix(buckets: Tensor) -> Tensor:
    """int64 -> int64 in 0..2^31 - 1, as good as random and the same on every machine."""
    mixed = buckets * 0x9E3779B1 & MASK
    mixed = xor(mixed, mixed >> 15) * 0x2C1B3C6D & MASK
    return xor(mixed, mixed >> 13) & MASK


def has_any(features: Tensor) -> Tensor:
    """bool (N, 1): which rows are not all 0. Compared, since ONNX would have `any` of whole numbers."""
    return (features != 0).any(dim=1, keepdim=True)


def xor(left: Tensor, right: Tensor) -> Tensor:
    """`left ^ right` of numbers that are not negative; torch exports no such operator."""
    return left + right - 2 * (left & right)


class OneTower(ItemModel):
    """Parts of an item -> [p ; q], float (N, 2 x embedding_size)."""

    def __init__(self, settings: ModelSettings, text: nn.Module | None, image: nn.Module | None) -> None:
        super().__init__()
        self.settings = settings
        self.trunk = Trunk(text, image)
        sizes, widths = settings.part_sizes(), self.widths()
        self.projections = nn.ModuleDict({name: Projection(widths[name], sizes[name]) for name in widths})
        self.words = Words(sizes["words"], settings.parts.keys) if sizes["words"] else None
        self.bias = nn.Parameter(torch.zeros(2))
        """Square roots of what is taken from and added to every score."""

    def projected(self) -> list[tuple[str, Projection]]:
        """The projected parts in their order."""
        return [(name, part) for name, part in self.projections.items() if isinstance(part, Projection)]

    def widths(self) -> dict[str, int]:
        """Raw numbers by part, of those that are projected."""
        found: dict[str, int] = {}
        if self.trunk.text is not None:
            found["text"] = TEXT_STATES * int(self.trunk.text.config.hidden_size)  # type: ignore[arg-type, union-attr]
        if self.trunk.image is not None:
            found["image"] = int(self.trunk.image.num_features)  # type: ignore[arg-type]
        colours = {"object_colour": OBJECT_WIDTH, "whole_colour": WHOLE_WIDTH}
        return found | {name: width for name, width in colours.items() if self.settings.part_sizes()[name]}

    def raw(self, images: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Raw features by part, float (N, width): rows of 0 where an item has no text or no picture.

        images float (N, 3, S, S) normalised, all 0 where there is none; ids and mask as in Trunk.features.
        """
        found: dict[str, Tensor] = {}
        if self.trunk.text is not None:
            states = self.trunk.states(ids, mask).float()  # (N, T, H)
            mask = torch.ones_like(ids) if mask is None else mask
            has_text = mask.sum(dim=1, keepdim=True) > EMPTY_TEXT
            mean = (states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            found["text"] = torch.cat([states[:, 0], mean], dim=1) * has_text
        has_image = has_any(images.flatten(1))
        if self.trunk.image is not None:
            found["image"] = self.image_features(images) * has_image
        colours = {"object_colour": object_colours, "whole_colour": whole_colours}
        if any(name in self.projections for name in colours):
            settings = self.settings.image
            mean, deviation = (
                constant(numbers, images.device).view(1, 3, 1, 1) for numbers in (settings.mean, settings.deviation)
            )
            rgb = (images.float() * deviation + mean).clamp(0, 1)
            with torch.autocast(images.device.type, enabled=False):  # half precision has too few digits for CIELAB
                found |= {name: count(rgb) * has_image for name, count in colours.items() if name in self.projections}
        return found

    def image_features(self, images: Tensor) -> Tensor:
        """What the image encoder says, its mean over the views: whole, mirrored, middle. float (N, F)."""
        assert self.trunk.image is not None
        views = [images]
        if self.settings.parts.views > 1:
            views.append(images.flip(3))
        if self.settings.parts.views > 2:
            side = images.shape[-1]
            edge = int(side * CROPPED / 2)
            middle = images[..., edge : side - edge, edge : side - edge]
            views.append(interpolate(middle, size=(side, side), mode="bilinear"))
        return torch.stack([self.trunk.image(view).float() for view in views]).mean(dim=0)

    def joined(self, raw: Mapping[str, Tensor], *words: Tensor) -> Tensor:
        """As in ItemModel."""
        some = (*words, *raw.values())[0]
        one = torch.ones(some.shape[0], 1, device=some.device)
        p = [one * self.bias[0], *(has_any(raw[name]) * part.lack for name, part in self.projected())]
        q = [one * self.bias[1], *(part(raw[name]) for name, part in self.projected())]
        if self.words is not None:
            part, lacking, common = self.words(*words)
            # (1 + c_a)(1 + c_b) - c_a c_b = 1 + c_a + c_b: a term of each side alone.
            p += [lacking, common]
            q += [part, 1 + common]
        halves = (torch.cat(p, dim=1), torch.cat(q, dim=1))
        size = self.settings.embedding_size
        return torch.cat([pad(half, (0, size - half.shape[1])) for half in halves], dim=1)
