"""Typed settings: presets (YAML), `section.key=value` overrides, validation with every problem shown at once.

The resolved settings travel in the checkpoint; `predict` reads the model's from there and nowhere else.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import orjson
import pydantic
import yaml
from pydantic import BeforeValidator, Field

from tongkuan.base.errors import UserError, clip, entrypoint, nearest
from tongkuan.base.numbers import as_number, finite_throughout
from tongkuan.records.attributes import TEN_KEYS, AttributeStyle

MAX_PRESET = 100_000  # bytes
INTEGER = "tag:yaml.org,2002:int"
ONE_TOWER_CONSTANTS = 2  # numbers of q that are no part's
PRESET_DIR = Path(__file__).resolve().parents[1] / "presets"
Precision = Literal["fp32", "bf16", "fp16"]
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

    text: SizeOrZero = 96
    """The text encoder's [CLS] and mean of tokens."""
    image: SizeOrZero = 160
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
    precision: Precision = "fp32"
    """Arithmetic of the encoders; weights and loss stay fp32. fp16 is for GPUs: a CPU takes ten times as long."""
    checkpoint_activations: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
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


def preset_names() -> list[str]:
    """The presets that come with the project."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


Origins = dict[tuple[str, ...], str]
"""Where values come from (`FILE:LINE` or an override), by their keys' path."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings, and what was said of them where."""

    settings: Settings
    values: Mapping[str, Any]
    """As written: what is not here is a default."""
    origins: Origins


def load_settings(preset: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a preset (a name, or a YAML file's path) with overrides `section.key=value` on top.

    Raises UserError listing every problem: unknown keys with the nearest name, wrong types and ranges.
    """
    return resolve(preset, overrides).settings


def resolve(preset: str, overrides: Sequence[str] = ()) -> Resolved:
    """load_settings, with the origin of each value."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESET_DIR / f"{preset}.yaml"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PRESET + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        names = preset_names()
        advice = f"name a YAML file or one of {', '.join(names)}"
        raise UserError(f"{clip(preset)}: no such preset{nearest(preset, names)}; {advice}") from error
    if len(data) > MAX_PRESET:
        raise UserError(f"{path}: larger than {MAX_PRESET:,} bytes; name a file of settings")
    try:
        values, root = parse_yaml(data.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML ({reason_of(error)}); mend the line") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections model, train, data; found {clip(values)}")
    origins: Origins = {}
    for loc, line_number in key_lines(root):
        if loc in origins:
            raise UserError(f"{path}:{line_number}: {clip('.'.join(loc))} stands here twice; keep one")
        origins[loc] = f"{path}:{line_number}"
    for override in overrides:
        keys, origin = apply_override(values, override)
        # What the file said of parts of this value holds no longer.
        origins = {loc: source for loc, source in origins.items() if loc[: len(keys)] != keys} | {keys: origin}
    return Resolved(validate(values, origins, str(path)), values, origins)


def show(preset: str, overrides: Sequence[str] = ()) -> str:
    """What the verb `settings` prints: describe's text, and the next command."""
    return f"{describe(resolve(preset, overrides))}\n# next: {entrypoint('train', '--preset', preset)}"


def describe(resolved: Resolved) -> str:
    """The settings as YAML, which is a preset again, each value with its origin beside it."""
    width = 50

    def lines(values: Mapping[str, Any], said: Any, prefix: tuple[str, ...]) -> Iterator[str]:
        for key, value in values.items():
            loc, indent = (*prefix, key), "  " * len(prefix)
            is_said = isinstance(said, Mapping) and key in said
            if isinstance(value, dict) and value:
                yield f"{indent}{key}:"
                yield from lines(value, said[key] if is_said else None, loc)
                continue
            style = None if isinstance(value, list) else False
            text = yaml.safe_dump({key: value}, default_flow_style=style, allow_unicode=True, width=10**6).strip()
            origin = (origin_of(resolved.origins, loc) or "default") if is_said else "default"
            yield f"{indent + text:<{width}}  # {origin.removeprefix(f'{PRESET_DIR}/')}"

    return "\n".join(
        lines(resolved.settings.model_dump(mode="json", context={"everything": True}), resolved.values, ())
    )


def origin_of(origins: Origins, loc: tuple[str, ...]) -> str | None:
    """Of a value, or of the nearest section around it that came from one place."""
    return next((origins[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in origins), None)


class Loader(yaml.SafeLoader):
    """Plain values without aliases, by which a few lines can stand for gigabytes, or for themselves.

    Whole numbers are decimal: by YAML's rules 010 is 8 and 1:30 is 90.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            problem = "an alias; write the value out"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # a tag or a date with a value that is none raises whatever its constructor does
            problem = f"a value that its type cannot take: {clip(str(error), 80)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


# A copy: what YAML reads elsewhere is not ours to change.
Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != INTEGER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """(values, nodes that know their lines) of a document. Raises yaml.YAMLError for whatever is wrong with it."""
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        return (loader.construct_document(root) if root else None), root
    except RecursionError as error:
        raise yaml.YAMLError("nested too deep") from error


def reason_of(error: Exception) -> str:
    """What YAML's reader says, on one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def key_lines(node: yaml.Node | None, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], int]]:
    """(key path, line from 1) for every key of a YAML mapping."""
    lines = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        path = (*prefix, str(key.value))
        lines += [(path, key.start_mark.line + 1), *key_lines(value, path)]
    return lines


def apply_override(values: dict[str, Any], override: str) -> tuple[tuple[str, ...], str]:
    """Set `section.key=value` in `values`; returns its keys and its origin, for error lines."""
    name, separator, text = override.partition("=")
    keys = tuple(name.split("."))
    if not separator or not all(keys) or len(keys) < 2:
        raise UserError(f"{clip(override)}: an override reads section.key=value, such as train.steps=100")
    try:
        value, _ = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{clip(override)}: the value is not YAML ({reason_of(error)}); quote it") from error
    section = values
    for key in keys[:-1]:
        if not isinstance(section.setdefault(key, {}), dict):
            raise UserError(f"{clip(override)}: {key} is a value, not a section; name one of its neighbours")
        section = section[key]
    section[keys[-1]] = value
    return keys, f"override {clip(override)}"


def validate(values: dict[str, Any], origins: Origins, source: str) -> Settings:
    """Typed settings, or a UserError with one line a problem."""
    try:
        settings = Settings.model_validate(values)
    except pydantic.ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            loc = tuple(str(part) for part in problem["loc"])
            where = origin_of(origins, loc) or source
            name = clip(".".join(loc), 120)
            if problem["type"] == "extra_forbidden":
                what = f"unknown setting {name}{nearest(loc[-1], known_keys(loc[:-1]))}; rename or delete it"
            else:
                message = problem["msg"].removeprefix("Value error, ").lower()
                what = f"{name[1:-1]}: {message}, found {clip(problem['input'])}; change it"
            problems.append(f"{where}: {what}")
        raise UserError(*problems) from error
    problems = [f"{source}: {problem}" for problem in contradictions(settings)]
    if problems:
        raise UserError(*problems)
    return settings


def known_keys(prefix: tuple[str, ...]) -> list[str]:
    """Setting names of a section, by its path."""
    section: type[Section] = Settings
    for key in prefix:
        inner = section.model_fields[key].annotation if key in section.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            return []
        section = inner
    return list(section.model_fields)


def contradictions(settings: Settings) -> list[str]:
    """Settings that are right one by one and wrong together."""
    problems = []
    if settings.train.pairs % settings.train.accumulate:
        problems.append("train.pairs must be a multiple of train.accumulate; change one of them")
    if not settings.train.steps and settings.model.towers != "one":
        problems.append("train.steps=0 leaves two towers as they start; take steps, or set model.towers=one")
    if settings.model.towers == "one":
        size, taken = settings.model.embedding_size, sum(settings.model.part_sizes().values()) + ONE_TOWER_CONSTANTS
        if taken > size or settings.model.part_sizes()["words"] < 0 or settings.model.parts.keys + 2 > size:
            problems.append(
                f"model.parts and {ONE_TOWER_CONSTANTS} more numbers do not fit in model.embedding_size={size}; "
                "make parts or their keys fewer, or it larger"
            )
    for key, value in settings.model.text.config.items():
        is_size = key.startswith("num_") or (key.endswith("_size") and key != "type_vocab_size")  # of which 0 is none
        if is_size and not (isinstance(value, int) and value >= 1):
            problems.append(f"model.text.config.{key}: input should be at least 1, found {clip(value)}; change it")
    try:
        orjson.dumps(settings.model_dump(mode="json"))
    except (TypeError, ValueError) as error:  # now rather than when the first model is to be saved
        problems.append(f"a value that no model file can hold ({clip(str(error), 80)}); change it")
    return problems
