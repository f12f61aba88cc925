"""Typed settings, each with what it is for; presets.py reads them as people write them.

The resolved settings travel in the checkpoint; `predict` reads the model's from there and nowhere else.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from tongkuan.base.numbers import as_number, finite_throughout
from tongkuan.records.attributes import TEN_KEYS, AttributeStyle

ONE_TOWER_CONSTANTS = 2  # numbers of q that are no part's
ONE_TOWER_PRESENCES = 10  # numbers of p at most that are no key's
Precision = Literal["fp32", "tf32", "bf16", "fp16", "bf16-residual", "bf16-compiled"]
Inputs = Literal["both", "text", "image"]
Towers = Literal["two", "shared", "one"]
Scalar = bool | int | float | str
Number = BeforeValidator(as_number)
# Wide of what anybody needs, and narrow enough for arithmetic, memory and model files to hold.
Count = Annotated[int, Number, Field(ge=1, le=10**9)]  # of steps
CountOrZero = Annotated[int, Number, Field(ge=0, le=10**9)]
Size = Annotated[int, Number, Field(ge=1, le=65_536)]
SizeOrZero = Annotated[int, Number, Field(ge=0, le=512)]
Threads = Annotated[int, Number, Field(ge=1, le=4096)]
Share = Annotated[float, Number, Field(ge=0, le=1)]
Moment = Annotated[float, Number, Field(ge=0, lt=1)]
Rate = Annotated[float, Number, Field(gt=0, le=1000)]
RateOrZero = Annotated[float, Number, Field(ge=0, le=1000)]
Mean = Annotated[float, Number, Field(ge=-1000, le=1000)]
Deviation = Annotated[float, Number, Field(ge=1e-6, le=1000)]
LAST = "last-"


def checked_encoders(value: str) -> str:
    """A value of train.encoders as it is; ValueError for any other."""
    if not re.fullmatch(rf"all|frozen|{LAST}[1-9][0-9]{{0,3}}", value):
        raise ValueError(f"input should be all, frozen or {LAST}n, n at least 1, such as {LAST}2")
    return value


class Section(pydantic.BaseModel):
    """A group of settings; unknown keys are errors, never ignored."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    later: ClassVar[tuple[str, ...]] = ()
    """Settings that came after the first models: a file says them only where they are no default, so that the same
    training still gives the same bytes."""

    @pydantic.model_serializer(mode="wrap")
    def serialised(
        self, write: pydantic.SerializerFunctionWrapHandler, info: pydantic.SerializationInfo
    ) -> dict[str, Any]:
        """As plain values; all of them when the context asks for `everything`."""
        values: dict[str, Any] = write(self)
        if not (info.context and info.context.get("everything")):
            for name in self.later:
                if getattr(self, name) == type(self).model_fields[name].default:
                    values.pop(name, None)
        return values


class TextEncoder(Section):
    """A transformers text encoder; its `[CLS]` of the last layer describes the text."""

    weights: str = "random"
    """hub:NAME, folder:DIR, package:NAME/FOLDER, or random (then `config` names the sizes)."""
    config: Annotated[dict[str, Scalar], BeforeValidator(finite_throughout)] = {"model_type": "bert"}
    """Fields of the transformers configuration that replace the encoder's own."""
    max_tokens: Size = 140
    """Longer texts are cut; [CLS] and [SEP] count."""


class ImageEncoder(Section):
    """A timm image encoder, pooled."""

    architecture: str = "swin_large_patch4_window12_384"
    """timm's name of the network."""
    weights: str = "random"
    """hub:NAME, folder:FILE, package:NAME/FILE, or random."""
    size: Size = 384
    """Pixels a side; pictures are squashed to it, bicubic."""
    mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    """Of RGB / 255, taken off; ImageNet's by default."""
    deviation: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    """Of RGB / 255, divided by."""
    arguments: Annotated[dict[str, Any], BeforeValidator(finite_throughout)] = {}
    """Further arguments of timm.create_model."""


class Parts(Section):
    """What one tower reads an item by: numbers of the embedding that each part has; 0 leaves a part out."""

    text: SizeOrZero = 64
    """The text encoder's [CLS] and mean of tokens."""
    image: SizeOrZero = 128
    """The image encoder's pooled features."""
    views: Annotated[int, Number, Field(ge=1, le=3)] = 1
    """Pictures that the image encoder is shown of each: the whole, mirrored, its middle."""
    object_colour: SizeOrZero = 48
    """CIELAB of what is not ground."""
    whole_colour: SizeOrZero = 32
    """HSV of the picture and of its middle."""
    words: SizeOrZero | None = None
    """Pieces of the text, model numbers and what is said by key; empty: what is left."""
    keys: SizeOrZero = 60
    """Keys at most that count each by itself, the commonest of the training items."""


class ModelSettings(Section):
    """The towers: all that `predict` needs to know."""

    later: ClassVar[tuple[str, ...]] = ("towers", "parts")
    towers: Towers = "two"
    """two: as published. shared: one trunk, a head for p and one for q. one: parts joined with learned weights."""
    parts: Parts = Parts()
    inputs: Inputs = "both"
    """text and image, or one alone (for the ablation)."""
    embedding_size: Annotated[int, Number, Field(ge=1, le=512)] = 512
    """Numbers a tower; the submitted embedding has twice as many, at most 1,024."""
    attributes: AttributeStyle = "quoted"
    """quoted: split, then normalise. published: normalise, then split, as the paper's code did."""
    attribute_keys: tuple[str, ...] = TEN_KEYS
    """Keys whose values follow the title, in this order."""
    text: TextEncoder = TextEncoder()
    image: ImageEncoder = ImageEncoder()

    @property
    def has_text(self) -> bool:
        """Whether a text encoder reads tokens."""
        return self.inputs != "image" and (self.towers != "one" or self.parts.text > 0)

    @property
    def has_image(self) -> bool:
        """Whether an image encoder looks at pictures."""
        return self.inputs != "text" and (self.towers != "one" or self.parts.image > 0)

    def part_sizes(self) -> dict[str, int]:
        """Numbers by part of one tower's q, of those that `inputs` allows; negative words: the others are too many."""
        parts, reads_texts, looks = self.parts, self.inputs != "image", self.inputs != "text"
        sizes = {
            "text": parts.text if reads_texts else 0,
            "image": parts.image if looks else 0,
            "object_colour": parts.object_colour if looks else 0,
            "whole_colour": parts.whole_colour if looks else 0,
        }
        left = self.embedding_size - ONE_TOWER_CONSTANTS - sum(sizes.values())
        return sizes | {"words": (left if parts.words is None else parts.words) if reads_texts else 0}


class Augmentation(Section):
    """Changes to training items, drawn anew at each visit; all 0 is none, as published."""

    crop: Share = 0.0
    """A random window keeps at least 1 - crop of each side."""
    flip: Share = 0.0
    """Chance that the picture is mirrored."""
    color: Share = 0.0
    """Brightness and contrast change by at most this share."""
    drop_image: Share = 0.0
    """Chance that the picture is blanked."""
    drop_text: Share = 0.0
    """Chance that a token is left out."""


class TrainSettings(Section):
    """How the towers learn (published values: arXiv 2208.11064, run 63)."""

    steps: CountOrZero = 100_000
    """Optimiser steps; 0 with one tower: only what is found without any."""
    pairs: Size = 8
    """Pairs a step, over all ranks and accumulated parts: the global batch."""
    accumulate: Size = 1
    """Parts that a rank's share of the batch is run in, one after another."""
    precision: Precision | None = None
    """Arithmetic of the encoders; weights, heads and loss stay fp32. Empty: bf16 on a GPU that multiplies it, else
    fp32. Those that begin with bf16 differ in speed on a GPU, see training.md. tf32 and fp16 are for GPUs: a CPU
    computes tf32 as fp32, and fp16 ten times slower."""
    checkpoint_activations: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    cuda_graphs: bool = False
    """Play back the picture encoders' work on a GPU instead of launching it kernel by kernel: faster where a rank has
    few pairs a step. It pads pictures to two a pair, which changes the last bits of the weights."""
    threads: Threads | None = None
    """Of a rank on a CPU; empty: its share of the cores. Their number changes the last bits of the weights."""
    learning_rate: Rate = 2e-6
    """Adam's, at its peak."""
    image_learning_rate: Rate | None = None
    """Of the image encoders; learning_rate when empty."""
    head_learning_rate: Rate | None = None
    """Of the two linear layers; learning_rate when empty."""
    final_learning_rate: RateOrZero = 1e-7
    """Where the cosine ends."""
    later: ClassVar[tuple[str, ...]] = ("encoders", "layer_decay", "negatives", "cuda_graphs")
    encoders: Annotated[str, AfterValidator(checked_encoders)] = "all"
    """What of the encoders learns: all of it, nothing (frozen), or the last N blocks of each (last-2) with what follows
    them. Frozen encoders without augmentation run once an item, at fp32: then steps take milliseconds."""
    layer_decay: Annotated[float, Number, Field(gt=0, le=1)] = 1.0
    """A block's learning rate as a share of the next block's: the first blocks change the least."""
    negatives: RateOrZero = 0.0
    """Weight of a second loss: that listings of a part that the pairs do not join are not the same product. Their
    number, and so what is learned, depends on ranks and accumulate."""
    draw: Literal["random", "component"] = "random"
    """random: as published. component: pairs that share items meet in a batch, so fewer items are encoded."""
    whiten: bool = False
    """Start the two linear layers from the spread of the encoders' features over training items."""
    warmup_steps: CountOrZero = 0
    """Steps of linear rise over the cosine; a shorter run only sees the rise."""
    weight_decay: RateOrZero = 1e-6
    """L2, added to the gradient as Adam does."""
    betas: tuple[Moment, Moment] = (0.9, 0.999)
    """Adam's, of the two moments."""
    clip_norm: Annotated[float, Number, Field(gt=0)] = 0.5
    """Largest gradient norm."""
    seed: Annotated[int, Number, Field(ge=0, lt=2**32)] = 0
    """Of weights that start at random, of the order of the pairs, dropout and augmentation."""
    validate_every: Count = 2_000
    """Steps between validations; the last step always validates."""
    save_every: Count = 2_000
    """Steps between checkpoints for resuming."""
    log_every: Count = 50
    """Steps between rows of metrics.jsonl."""
    augmentation: Augmentation = Augmentation()

    @property
    def trained_blocks(self) -> int | None:
        """How many blocks at the end of each encoder learn; None for whole encoders."""
        if self.encoders in ("all", "frozen"):
            return None if self.encoders == "all" else 0
        return int(self.encoders.removeprefix(LAST))

    @property
    def reuses_features(self) -> bool:
        """Whether encoders say the same of an item at every step, so that they are asked once."""
        return self.encoders == "frozen" and self.augmentation == Augmentation()


class DataSettings(Section):
    """How items are read and encoded; changes speed and memory, not what is learned."""

    workers: Threads = 4
    """Threads that decode pictures ahead."""
    encode_batch: Size | None = None
    """Items a batch when only encoding; empty: 32, on a CPU fewer when pictures are too large for its caches."""
    cache_mb: CountOrZero = 1024
    """Memory for decoded pictures and tokens kept between visits, MiB; of train and of valid, in each rank."""


class Settings(Section):
    """Everything a preset may say."""

    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    data: DataSettings = DataSettings()
