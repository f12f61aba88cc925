"""Attribute writings as people have them: texts with any separators, HTML in them, JSON in them, and JSON values.

Three questions are answered here: which (key, value) pairs a text says, which a JSON value says, and how pairs are
written so that every reader behind reads them back (`key#:#value#;#`).
"""

import ast
import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

Pairs = list[tuple[str, str]]

MAX_DEPTH = 16  # of JSON values within one another
MAX_LITERAL = 20_000  # characters; Python's own parser takes memory by the character
INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
# Only tags that are known are tags: `<5kg` is text.
LINE_TAG = re.compile(r"<(?:br|/?p|/?div|/?li|/?tr|/?ul|/?ol|/?h[1-6])(?:[\s/][^<>]*)?>", re.IGNORECASE)
TAG = re.compile(
    r"</?(?:a|b|i|u|s|em|strong|span|font|small|big|sup|sub|mark|del|ins|img|td|th|table|tbody|thead|dl|dt|dd|label"
    r"|center|code|pre|section|article|body|html|input|button)(?:[\s/][^<>]*)?>",
    re.IGNORECASE,
)
ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

# What may stand between attributes, the likeliest first, and between a key and its value.
SEPARATORS = tuple(
    map(re.compile, (r"#?;", r"[\r\n]+", "#?；", r"[|｜]", "[,，]", "、", r"\t+", r"(?:\\r)?\\n", "[ \u3000\xa0]+"))
)
SIGNS = tuple(map(re.compile, ("#:#|#:|:", "#：#|#：|：", "#:#|#[:：]|[:：]", "[=＝]")))
GLUES = dict(
    zip(SEPARATORS[:6], (";", " ", "；", "|", ",", "、"), strict=True)
)  # where a part without a key is more of a value
NO_KEY = re.compile(r"[:：;；=＝|｜,，、\r\n\t]|^\s*$")  # a key holds no sign of another writing
NO_USUAL_KEY = re.compile(r"[=＝\r\n]|^\s*$")  # of `key:value;key:value`
NOT_A_PAIR = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*://|\d+[:：]\d)")  # an address, a time, a ratio

# Keys of objects such as {"name": "品牌", "value": "甲"}, in lower case without `_`, `-` and blanks.
NAME_KEYS = (
    "attrname", "attributename", "propertyname", "propname", "paramname", "specname", "name", "key", "k", "attribute",
    "attr", "property", "prop", "属性名", "属性名称", "参数名", "规格名", "名称", "属性", "键", "label",
)  # fmt: skip
VALUE_KEYS = (
    "attrvalue", "attributevalue", "propertyvalue", "propvalue", "paramvalue", "specvalue", "valuename", "value",
    "values", "v", "val", "vals", "属性值", "参数值", "规格值", "值",
)  # fmt: skip
UNIT_KEYS = ("unit", "unittext", "单位")


def plain(text: str) -> str:
    """Text as a reader of the page sees it: HTML tags gone, entities resolved, characters without width dropped."""
    if "<" in text:
        text = TAG.sub("", LINE_TAG.sub("\n", text))
    if "&" in text:
        text = ENTITY.sub(lambda found: html.unescape(found[0]), text)
    return text if text.isascii() else INVISIBLE.sub("", text)


def pairs_of_text(text: str) -> Pairs:
    """(key, value) of an attribute text, plain but not normalised; what has no key is left out.

    JSON is taken for what it says, and the strict writing (`#;#`) wins when present. Else one separator is taken for
    the whole text: the first at which every part has a key. Other signs stay in the values.
    """
    if found := json_pairs(text):
        return [(plain(key), plain(value)) for key, value in found]
    if is_strict(text):
        return [
            (plain(key), plain(value)) for part in text.split("#;#") for key, sign, value in [split_key(part)] if sign
        ]
    return loose_pairs(plain(text))


def is_strict(text: str) -> bool:
    return "#;#" in text or text.count("#:#") == 1


def split_key(segment: str) -> tuple[str, str, str]:
    """(key, separator, value) at the strictest separator that the segment holds."""
    for separator in ("#:#", "#:", ":"):
        if separator in segment:
            return segment.partition(separator)
    return segment, "", ""


def loose_pairs(text: str) -> Pairs:
    """Pairs of a text whose separators are to be found out."""
    signs = [sign for sign in SIGNS if sign.search(text)]
    separators = [separator for separator in SEPARATORS if signs and separator.search(text)]
    for separator in separators:
        for sign in signs:
            if len(found := read_all(text, separator, sign)) > 1:
                return found
    glued = [glue(text, separator, sign) for separator in separators if separator in GLUES for sign in signs]
    if found := next((found for found in glued if len(found) > 1), []):
        return found
    for sign in signs:
        if pair := read_pair(text.strip().rstrip(";；"), sign):
            return [pair]
    if found := next(filter(None, glued), []):
        return found
    return [(key, value) for key, mark, value in map(split_key, plain_segments(text)) if mark]


def read_all(text: str, separator: re.Pattern[str], sign: re.Pattern[str]) -> Pairs:
    """The pairs of all parts; nothing when one of them is no pair."""
    found = []
    no_key = NO_USUAL_KEY if (separator, sign) == (SEPARATORS[0], SIGNS[0]) else NO_KEY
    for part in separator.split(text):
        if part.strip():
            if (pair := read_pair(part, sign, no_key)) is None:
                return []
            found.append(pair)
    return found


def read_pair(part: str, sign: re.Pattern[str], no_key: re.Pattern[str] = NO_KEY) -> tuple[str, str] | None:
    """The part as key and value, None when it does not look like that."""
    pieces = sign.split(part, maxsplit=1)
    if len(pieces) < 2 or no_key.search(pieces[0].strip()) or NOT_A_PAIR.match(part):
        return None
    return pieces[0], pieces[1]


def glue(text: str, separator: re.Pattern[str], sign: re.Pattern[str]) -> Pairs:
    """Pairs at `separator`, a part without a key being more of the value before it."""
    found: list[tuple[str, list[str]]] = []
    no_key = NO_USUAL_KEY if (separator, sign) == (SEPARATORS[0], SIGNS[0]) else NO_KEY
    for part in separator.split(text):
        if pair := read_pair(part, sign, no_key):
            found.append((pair[0], [pair[1]]))
        elif found and part.strip():
            found[-1][1].append(part)
    return [(key, GLUES[separator].join(pieces)) for key, pieces in found]


def plain_segments(text: str) -> list[str]:
    """Segments at `;`, one without `:` being more of the value before it."""
    segments: list[str] = []
    for part in re.split(r"#?;", text):
        if segments and ":" not in part:
            segments[-1] += ";" + part
        else:
            segments.append(part)
    return segments


# ---------------------------------------------------------------------------------------------------------------------
# JSON values


def json_pairs(text: str) -> Pairs:
    """Pairs with keys of a text that is JSON; nothing for other texts, and for values nested too deeply."""
    value = json_in(text)
    try:
        return [] if value is None else [pair for pair in pairs_of_value(value) if pair[0]]
    except ValueError:
        return []


def json_in(text: str) -> Any:
    """The dict or list that a text holds as JSON, or as Python prints it; None when it holds none."""
    text = text.strip()
    if text[:1] == '"' and ":" in text:
        text = "{" + text.rstrip(",") + "}"
    if text[:1] + text[-1:] not in ("{}", "[]"):
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    if len(text) > MAX_LITERAL or "'" not in text:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def pairs_of_value(value: Any, depth: int = 0) -> Pairs:
    """(key, value) of a JSON dict or list, in order; what has no key comes with the key "".

    Raises ValueError when values lie deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        return pairs_of_object(value, depth)
    if isinstance(value, list | tuple):
        if len(value) == 2 and depth and all(isinstance(each, str) for each in value) and not has_sign(value):
            return [(value[0], value[1])]
        return [pair for each in value for pair in pairs_of_value(each, depth + 1)]
    text = text_of(value)
    if isinstance(value, str) and (found := pairs_of_text(text)):
        return found
    return [("", text)] if text else []


def has_sign(texts: Iterable[str]) -> bool:
    return any(pairs_of_text(text) for text in texts)


def pairs_of_object(value: Mapping[Any, Any], depth: int) -> Pairs:
    """Of {key: value, …}, of {"name": key, "value": value}, and of objects within."""
    if (named := named_pair(value)) is not None:
        key, inner = named
        return [(key, text) for text in texts_of(inner, depth + 1)]
    pairs: Pairs = []
    for name, inner in value.items():
        key = text_of(name)
        if (isinstance(inner, Mapping) and quantity(inner) is None) or (
            isinstance(inner, list | tuple) and any(isinstance(each, Mapping) and named_pair(each) for each in inner)
        ):
            pairs += pairs_of_value(inner, depth + 1)
        else:
            pairs += [(key, text) for text in texts_of(inner, depth + 1)]
    return pairs


def named_pair(value: Mapping[Any, Any]) -> tuple[str, Any] | None:
    """(key, value) of an object that names them, None when it is something else."""
    names = {fold_name(name): inner for name, inner in value.items()}
    key = next((names[name] for name in NAME_KEYS if isinstance(names.get(name), str) and names[name].strip()), None)
    found = next((name for name in VALUE_KEYS if name in names), None)
    if key is None or found is None:
        return None
    return key, names[found]


def quantity(value: Mapping[Any, Any]) -> str | None:
    """`5kg` of {"value": 5, "unit": "kg"}; None for other objects."""
    names = {fold_name(name): inner for name, inner in value.items()}
    found = next((names[name] for name in VALUE_KEYS if name in names), None)
    if found is None or isinstance(found, Mapping | list | tuple):
        return None
    return text_of(found) + next((text_of(names[name]) for name in UNIT_KEYS if name in names), "")


def fold_name(name: Any) -> str:
    return re.sub(r"[\s_@-]+", "", str(name).lower())


def texts_of(value: Any, depth: int) -> Iterator[str]:
    """The texts of a value: of a list each, of an object its value or name, else its items as `key value`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, list | tuple):
        for each in value:
            yield from texts_of(each, depth + 1)
    elif isinstance(value, Mapping):
        text = quantity(value)
        if text is None:
            names = {fold_name(name): inner for name, inner in value.items()}
            inner = next((names[name] for name in NAME_KEYS if name in names), None)
            yield from texts_of(list(value.values()) if inner is None else inner, depth + 1)
        elif text:
            yield text
    elif text := text_of(value):
        yield text


def text_of(value: Any) -> str:
    """A scalar as text: numbers by their digits, null and NaN as nothing."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return digits_of(value)
    return str(value)


def digits_of(value: float) -> str:
    """A number's digits: 1001.0 is `1001`, 0.5 is `0.5`, NaN and infinity are nothing."""
    if value != value or value in (float("inf"), float("-inf")):
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def canonical(pairs: Sequence[tuple[str, str]]) -> str:
    """Pairs as `key#:#value#;#…`, which is read back as the same pairs; one without a key as its value alone.

    Where a key or value holds the separators themselves, their `#` are dropped.
    """
    pieces = []
    for key, value in pairs:
        if "#;#" in f"#{value}#":
            value = f" {without_hashes(value, ';')}"  # the blank keeps a `;` apart from the sign before it
        if not key.strip():
            pieces.append(f"{without_hashes(value.replace('：', ':'), ':', ' ')}#;#")
            continue
        key = without_hashes(key, ";") if "#;#" in f"#{key}#" else key
        key = without_hashes(key, ":") if "#:#" in f"{key}#" else key
        pieces.append(f"{key}#:#{value}#;#")
    return "".join(pieces)


def without_hashes(text: str, sign: str, instead: str = "") -> str:
    """Text without `#` beside `sign`; `instead` replaces the sign itself."""
    return (instead or sign).join(part.strip("#") for part in text.split(sign))
