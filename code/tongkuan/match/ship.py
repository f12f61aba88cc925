"""A partition as it travels to another machine, and what encodes it there. No folder need be shared.

The model's file and the partition's picture files go as bytes, and lie in a temporary folder of the other machine
while it encodes. It computes by itself the sum of all that decides the partition's file: a machine that would come to
other numbers, by its processor or its packages, encodes nothing.
"""

import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tongkuan.base.errors import UserError
from tongkuan.base.machine import processor_of
from tongkuan.encode.inference import Inference
from tongkuan.encode.store import ItemStore, open_store
from tongkuan.match.embed import sums_of
from tongkuan.match.machines import EncodedPart, Part, encode_part
from tongkuan.model.modelfile import load_model
from tongkuan.ranks.group import join_ranks
from tongkuan.ranks.place import forget
from tongkuan.records.items import Item
from tongkuan.settings import DataSettings, Precision

Bytes = NDArray[np.uint8]  # of files; arrays are not copied on their way


@dataclass(frozen=True, slots=True)
class Shipment:
    """A partition with all that is read of it."""

    part: Part
    items: list[Item]
    side: int
    """Of pictures put by hand, see `ItemStore.side`."""
    pictures: Bytes
    """The files, one after the other."""
    ends: dict[str, int]
    """Of each picture's file in these, by name; one that cannot be read here is left out."""

    @classmethod
    def of(cls, store: ItemStore, part: Part) -> "Shipment":
        """Read the partition's picture files."""
        content, ends = bytearray(), dict[str, int]()
        for name in dict.fromkeys(filter(None, map(store.picture, part.item_ids))):
            try:
                content += (store.image_dir / name).read_bytes()
            except (OSError, ValueError):  # ValueError: a name that no file can have
                continue
            ends[name] = len(content)
        items = [store.items[item_id] for item_id in part.item_ids]
        return cls(part, items, store.side, np.frombuffer(content, np.uint8), ends)

    def unpack(self, folder: Path) -> None:
        """Write the picture files into a folder."""
        folder.mkdir()
        start = 0
        for name, end in self.ends.items():  # as `inside` leaves names, which lead nowhere else
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.pictures[start:end].tofile(folder / name)
            start = end


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes shipments on the machine where it is called."""

    model: Bytes
    """Of the model's file."""
    encode_batch: int | None
    precision: Precision
    processor: str
    """Of the machine that it comes from."""

    @classmethod
    def of(cls, run: Inference) -> "Encoder":
        """With a run's model and settings."""
        model = np.fromfile(run.files["model"], np.uint8)
        return cls(model, run.settings.encode_batch, run.precision, processor_of(run.ranks.device))

    def __call__(self, shipment: Shipment) -> EncodedPart:
        """UserError, before anything is encoded, when this machine would come to other numbers than asked for."""
        part = shipment.part
        print(f"{part.label}: {len(part.item_ids)} listings", flush=True)  # in the log of this machine
        forget()  # ranks that its environment may name
        with tempfile.TemporaryDirectory(prefix="tongkuan-") as name, join_ranks() as ranks:
            folder = Path(name)
            self.model.tofile(folder / "model.safetensors")
            shipment.unpack(folder / "images")
            model, card = load_model(folder / "model.safetensors")
            items = {item.item_id: item for item in shipment.items}
            store = open_store(items, folder, card.settings, card.open_tokenizer(), cache_mb=0)
            store.side = shipment.side
            files = {"model": folder / "model.safetensors"}
            settings = DataSettings(encode_batch=self.encode_batch)
            run = Inference(files, model, card, items, [], store, ranks, self.precision, settings, None)
            if list(sums_of(run, store, [part.item_ids])) != [part.made_of]:
                raise UserError(f"{part.label}: {self.differs_by(processor_of(ranks.device))}")
            return encode_part(run, store, part)

    def differs_by(self, processor: str) -> str:
        """Why this machine, of that processor, is not to encode."""
        what = "other packages, or the files changed meanwhile; give all nodes the same installation and start again"
        if processor != self.processor:
            what = f"{processor} and not {self.processor}; start on a node like those that are to encode"
        return f"node {platform.node()} would come to other numbers: it has {what}"
