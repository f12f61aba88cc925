"""Which picture an item's name means: by steps from strict to loose, and never by a guess between two files.

Each step counts only when it gives one file; two files of the same bytes are one. Near linear in items and pictures.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from data_scripts.linking.ledger import Digests, Picture
from data_scripts.linking.names import FORMS, SUFFIX, fold, folded, original, path_steps, stems, tails
from tongkuan.records.items import Item

Form = Callable[[str], tuple[str, ...]]


@dataclass(slots=True)
class Match:
    """What a name leads to. `rivals` are the files between which nothing decides; then there is no `picture`."""

    picture: Picture | None = None
    rivals: tuple[Picture, ...] = ()
    is_by_tail: bool = False  # the folder that the name gives is not among the pictures
    is_in_other_folder: bool = False  # by_tail, and the file lies in a folder that the name does not give
    is_of_other_split: bool = False
    is_by_stem: bool = False  # another suffix, or none
    detail: str = ""  # why there is none, beyond "no such file"


class Index:
    """Pictures by every tail of their paths (`a/b.jpg`, `b.jpg`), in each of the forms of names.py."""

    def __init__(self, pictures: list[Picture], digests: Digests) -> None:
        self.pictures, self.digests = pictures, digests
        self.tables: dict[Form, dict[str, list[Picture]]] = {}
        self.verdicts: dict[tuple[Form, tuple[str, ...]], tuple[Picture, ...]] = {}

    @cached_property
    def wrapper(self) -> int:
        """How many folders all pictures lie in together: archives often hold one, `images/` or `item_train_images/`."""
        paths = [picture.path.split("/")[:-1] for picture in self.pictures if SUFFIX.search(picture.path.lower())]
        first, last = min(paths, default=[]), max(paths, default=[])
        return next(
            (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
        )

    @cached_property
    def folders(self) -> set[str]:
        """Every tail of every folder that holds a picture."""
        parents = {original(picture.path)[0].rpartition("/")[0] for picture in self.pictures}
        return {tail for parent in parents for tail in tails(parent)}

    def table(self, form: Form) -> dict[str, list[Picture]]:
        """Pictures by tail; made when first asked for, since most names are found as written."""
        if form not in self.tables:
            table: dict[str, list[Picture]] = defaultdict(list)
            for picture in self.pictures:
                for key in form(picture.path):
                    for tail in tails(key):
                        table[tail].append(picture)
            self.tables[form] = dict(table)
        return self.tables[form]

    def fitting(self, form: Form, keys: tuple[str, ...]) -> tuple[Picture, ...]:
        """Pictures of different bytes whose path ends in one of `keys`; those whose whole path it is go first."""
        if (form, keys) not in self.verdicts:
            found = self.ending_in(form, keys)
            if len(found) > 1:
                whole = self.whole(form, found, keys, 0) or self.whole(form, found, keys, self.wrapper)
                found = self.distinct(whole or found)
            self.verdicts[form, keys] = tuple(found)
        return self.verdicts[form, keys]

    def whole(self, form: Form, pictures: list[Picture], keys: tuple[str, ...], less: int) -> list[Picture]:
        """Those of the pictures whose path, less so many folders, is one of the keys."""
        paths = ((picture, key.split("/", less)) for picture in pictures for key in form(picture.path))
        return list(dict.fromkeys(picture for picture, parts in paths if len(parts) > less and parts[less] in keys))

    def ending_in(self, form: Form, keys: tuple[str, ...]) -> list[Picture]:
        """All pictures whose path ends in one of `keys`."""
        table = self.table(form)
        return list(dict.fromkeys(picture for key in keys for picture in table.get(key, ())))

    def distinct(self, pictures: list[Picture]) -> list[Picture]:
        """The first of each that have the same bytes."""
        by_bytes: dict[str, Picture] = {}
        for picture in pictures:
            by_bytes.setdefault(self.digests.of(picture), picture)
        return list(by_bytes.values())

    def steps(self, name: str) -> Iterator[Match]:
        """What each step gives, strictest first; steps that give nothing are passed over."""
        by_form = {}
        for form in FORMS:
            by_form[form] = form(name)
            if found := self.fitting(form, by_form[form]):
                match = as_match(found)
                match.is_by_stem = form is stems
                yield match
        start = self.tail_start(name)
        for form, whole in by_form.items() if start else ():
            keys = tuple("/".join(key.split("/")[start:]) for key in whole)
            if found := self.fitting(form, keys):
                match = as_match(found)
                match.is_by_tail = True
                if match.picture:
                    depth = match.picture.path.count("/") - self.wrapper
                    match.is_in_other_folder = depth > keys[0].count("/")
                yield match

    def tail_start(self, name: str) -> int:
        """After how many folders of `name` the tail begins that may stand for it; 0 when none may.

        The first folder that does exist must be the picture's: `d/1.jpg` is never `a/1.jpg` while there is a d.
        """
        folders = original(name)[0].split("/")[:-1]
        known = (n for n in range(len(folders)) if "/".join(folders[n:]) in self.folders)
        return next(known, len(folders))


def as_match(found: tuple[Picture, ...]) -> Match:
    return Match(found[0]) if len(found) == 1 else Match(rivals=found)


class Matches:
    """The match of each distinct name of a split's items, and the names that lead to each picture."""

    def __init__(self, items: Mapping[str, Iterable[Item]], pictures: list[Picture], digests: Digests) -> None:
        """Reads only pictures that compete for a name."""
        self.everywhere = Index(pictures, digests)
        by_split = {split: [picture for picture in pictures if picture.split == split] for split in items}
        self.own = {
            split: self.everywhere if len(of_split) == len(pictures) else Index(of_split, digests)
            for split, of_split in by_split.items()
        }
        self.of: dict[tuple[str, str], Match] = {}
        for split, of_split in items.items():
            for name in dict.fromkeys(item.image_name for item in of_split if item.image_name):
                self.of[split, name] = next(self.own[split].steps(name), None) or self.elsewhere(split, name)
        self.take_back_guesses()
        self.claims = Claims((name, match) for (_, name), match in self.of.items())

    def elsewhere(self, split: str, name: str) -> Match:
        """The picture of another split, if its name occurs once in all splits; an empty match when there is none."""
        if self.own[split] is self.everywhere:
            return Match()
        match = next(self.everywhere.steps(name), Match())
        if match.picture:
            match.is_of_other_split = True
            files = self.everywhere.ending_in(folded, (fold(match.picture.name),))
            if len(files) > 1 and len(files := self.everywhere.distinct(files)) > 1:
                match.picture, match.rivals = None, tuple(files)
        return match

    def take_back_guesses(self) -> None:
        """A file whose folder an item does not give is another item's, if that one names it too."""
        claims = Claims((name, match) for (_, name), match in self.of.items())
        exact = Claims((name, m) for (_, name), m in self.of.items() if not m.is_by_tail and len(path_steps(name)) > 1)
        for (_, name), match in self.of.items():
            if match.picture and match.is_by_tail:
                others = claims if match.is_in_other_folder else exact
                if others.is_claimed(match.picture, name):
                    match.detail = f"no such file; {match.picture.path} is in another folder and other items name it"
                    match.picture = None

    def readable_instead(self, split: str, name: str) -> Picture | None:
        """A readable picture of the same split that a later step gives, and that no item of another name has."""
        for match in self.own[split].steps(name):
            found = [picture for picture in (match.picture, *match.rivals) if picture and picture.image]
            if found:
                is_free = len(found) == 1 and not match.is_by_tail and not self.claims.is_claimed(found[0], name)
                return found[0] if is_free else None
        return None


class Claims:
    """Which names lead to which picture. Names that differ only in what shops add to them count as one."""

    def __init__(self, matches: Iterable[tuple[str, Match]]) -> None:
        self.names: dict[Picture, list[str]] = {}
        self._originals: dict[Picture, set[tuple[str, ...]]] = {}
        for name, match in matches:
            if match.picture:
                self.names.setdefault(match.picture, []).append(name)

    def is_claimed(self, picture: Picture, name: str) -> bool:
        """Whether a name other than `name` leads to the picture."""
        names = self.names.get(picture, [])
        if names in ([], [name]):
            return False
        if picture not in self._originals:
            self._originals[picture] = {original(other) for other in names}
        return bool(self._originals[picture] - {original(name)})
