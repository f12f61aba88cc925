"""Presets and overrides: settings as people write them, YAML and `section.key=value`, every problem shown at once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pydantic
import yaml

from tongkuan.base.errors import UserError, clip, entrypoint, nearest
from tongkuan.settings import ONE_TOWER_CONSTANTS, ONE_TOWER_PRESENCES, Section, Settings

MAX_PRESET = 100_000  # bytes
INTEGER = "tag:yaml.org,2002:int"
PRESET_DIR = Path(__file__).resolve().parents[1] / "presets"


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
        if (
            taken > size
            or settings.model.part_sizes()["words"] < 0
            or settings.model.parts.keys + ONE_TOWER_PRESENCES > size
        ):
            problems.append(
                f"model.parts and {ONE_TOWER_CONSTANTS} more numbers do not fit in model.embedding_size={size}; "
                "make parts or their keys fewer, or it larger"
            )
        if not any(settings.model.part_sizes().values()):
            problems.append("model.parts leave nothing of an item to read; give one of them more than 0")
    for key, value in settings.model.text.config.items():
        is_size = key.startswith("num_") or (key.endswith("_size") and key != "type_vocab_size")  # of which 0 is none
        if is_size and not (isinstance(value, int) and value >= 1):
            problems.append(f"model.text.config.{key}: input should be at least 1, found {clip(value)}; change it")
    try:
        orjson.dumps(settings.model_dump(mode="json"))
    except (TypeError, ValueError) as error:  # now rather than when the first model is to be saved
        problems.append(f"a value that no model file can hold ({clip(str(error), 80)}); change it")
    return problems
