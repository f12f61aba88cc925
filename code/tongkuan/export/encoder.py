"""Items -> embeddings by an exported file: ONNX Runtime in place of torch, which nothing here imports.

An exported file is one .onnx that holds all that it takes: weights, tokenizer, threshold and what to read of an item.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import orjson
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tongkuan.base.errors import UserError, clip, missing, pip_install
from tongkuan.records.arrays import fit_tokenizer, padded_tokens, padded_words, stacked_pictures
from tongkuan.records.attributes import AttributeStyle, item_text
from tongkuan.records.items import Item
from tongkuan.records.pictures import UnreadableError, read_image
from tongkuan.records.words import words_of

FORMAT = "tongkuan-onnx-1"
CARD_KEY = "tongkuan"  # of an .onnx file's metadata
EXTRA = ("onnx==1.23.2", "onnxruntime==1.32.0")  # as pyproject.toml pins them
PICTURES, TOKENS, WORDS = ("images", "has_image"), ("ids", "mask"), ("buckets", "owners")
"""Inputs of a graph; it has those that its model reads."""
EMBEDDINGS = "embeddings"
LARGEST_PICTURE = 4096  # pixels a side, of what a graph says that it looks at
Feed = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Card:
    """What an exported file says of itself."""

    threshold: float
    """Listings are the same product when the score q_a.q_b - p_a.p_b is above."""
    tokenizer: str | None
    """As JSON; None for a model without texts."""
    max_tokens: int
    attributes: AttributeStyle
    attribute_keys: tuple[str, ...]
    picture_side: int
    """Pixels to which `resize` squashed the pictures of the catalogue: others are read as if it had."""
    model_sha256: str
    """Of the model file that it was made of."""

    def dumps(self) -> str:
        """As JSON; equal cards, equal text."""
        return orjson.dumps({"format": FORMAT, **asdict(self)}, option=orjson.OPT_SORT_KEYS).decode()


class OnnxEncoder:
    """An exported file, opened: the same numbers as torch's to about 1e-6, on the CPU."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        """UserError when the file is not there, damaged, or not one of ours."""
        runtime = import_runtime()
        if not path.is_file():
            raise missing(path, "no such file; make it: ./entrypoint.sh export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.log_severity_level = 3  # errors
        try:
            self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            about = self.session.get_modelmeta().custom_metadata_map[CARD_KEY]
        except KeyError as error:
            raise UserError(f"{path}: an ONNX model, but none that ./entrypoint.sh export made") from error
        except Exception as error:  # the runtime's own classes have no common one
            reason = clip(str(error).partition("\n")[0], 120)
            raise UserError(f"{path}: damaged or no ONNX model ({reason}); export it again") from error
        self.card = parse_card(path, about)
        shapes = {each.name: each.shape for each in self.session.get_inputs()}
        found = self.session.get_outputs()[0]
        known = {*PICTURES, *TOKENS, *WORDS}
        size = shapes["images"][-1] if "images" in shapes else 1
        is_size = isinstance(size, int) and 1 <= size <= LARGEST_PICTURE
        reads_tokens = "ids" in shapes
        is_ours = not shapes.keys() - known and found.name == EMBEDDINGS and isinstance(found.shape[-1], int)
        if not is_ours or not is_size or reads_tokens != (self.card.tokenizer is not None):
            raise UserError(f"{path}: its inputs and outputs are not those that ./entrypoint.sh export writes")
        self.inputs, self.size, self.width = frozenset(shapes), int(size), int(found.shape[-1])
        self.tokenizer = self.card.tokenizer and Tokenizer.from_str(self.card.tokenizer)
        self._padding = fit_tokenizer(self.tokenizer, self.card.max_tokens) if self.tokenizer else 0

    def feed(self, items: Sequence[Item], image_dir: Path, blank_unreadable: bool = False) -> Feed:
        """What the graph reads of items, whose pictures lie in `image_dir`.

        UserError for a picture that cannot be read, unless it is to count as blank.
        """
        found: Feed = {}
        if "images" in self.inputs:
            pictures = [self.picture(item, image_dir, blank_unreadable) for item in items]
            found |= zip(PICTURES, stacked_pictures(pictures, self.size), strict=True)
        if self.tokenizer:
            texts = [item_text(item, self.card.attribute_keys, self.card.attributes) for item in items]
            rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
            found |= zip(TOKENS, padded_tokens(rows, self._padding), strict=True)
        if "buckets" in self.inputs:
            words = padded_words([words_of(item, self.card.attributes) for item in items])
            found |= zip(WORDS, words, strict=True)
        return found

    def picture(self, item: Item, image_dir: Path, blank_unreadable: bool) -> NDArray[np.uint8] | None:
        """uint8 (3, S, S), or None for an item without one."""
        if not item.image_name:
            return None
        path = image_dir / item.image_name
        try:
            return read_image(path, self.size, self.card.picture_side)
        except UnreadableError as error:
            if blank_unreadable:
                return None
            raise UserError(f"{path}: {error}; give another picture, or none") from error

    def embed(self, feed: Feed) -> NDArray[np.float32]:
        """Embeddings [p ; q] (N, 2D) of what `feed` made."""
        found: NDArray[np.float32] = self.session.run([EMBEDDINGS], feed)[0]
        return found


def import_runtime() -> Any:
    """The module onnxruntime, told to report nothing to its makers; UserError with the command that installs it."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it is read when the module is imported
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"the Python package onnxruntime is not installed; install it: {pip_install(*EXTRA)}"
        ) from error
    return onnxruntime


def parse_card(path: Path, about: str) -> Card:
    """The card in a file's metadata, each field of its type. UserError when it is none."""
    try:
        found = orjson.loads(about)
        if found.pop("format") != FORMAT:
            raise UserError(f"{path}: made by another version of Tongkuan; export it again")
        card = Card(**found | {"attribute_keys": tuple(found["attribute_keys"])})
        sizes = (card.max_tokens, card.picture_side)
        if (
            not all(type(size) is int and 1 <= size <= 65_536 for size in sizes)
            or not isinstance(card.threshold, float | int)
            or not math.isfinite(card.threshold)
            or not all(isinstance(key, str) for key in card.attribute_keys)
            or card.attributes not in get_args(AttributeStyle)
        ):
            raise ValueError("card")
        if card.tokenizer is not None:
            Tokenizer.from_str(card.tokenizer)
    except UserError:
        raise
    except Exception as error:  # of a tokenizer that is none, tokenizers raises nothing narrower
        raise UserError(f"{path}: not a model that ./entrypoint.sh export made ({clip(str(error), 80)})") from error
    return card
