"""The sample catalogue's products and what their sellers write; `sample.py` adds pictures, pairs and files.

All brands are invented. No word here names a colour or a pattern except COLOURS: the texts of a family whose members
differ only in the picture must not give the difference away.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MISSING = "missing"  # stands for a field that the row will not have
Rng = np.random.Generator
Look = tuple[str, int, int, str]  # category, shape, colour, pattern
# Each pattern is printed in an ink of its own, RGB, unlike any colour of a product.
INKS = {
    "plain": (0, 0, 0), "rows": (252, 252, 252), "columns": (245, 130, 20), "diagonal": (150, 150, 150),
    "checks": (115, 65, 25), "halves": (165, 245, 205), "ring": (240, 225, 190),
}  # fmt: skip
PATTERNS = tuple(INKS)
# 12 families go to train, 2 to valid, 3 to test, and so on; six families (three of a kind) reach every split.
SPLITS = tuple({"T": "train", "V": "valid", "S": "test"}[letter] for letter in "TVSTTTSTTTVTTSTTT")

# Chinese word and RGB; well apart from one another, so that lighting does not turn one into its neighbour.
COLOURS = (
    ("红色", (215, 30, 35)), ("黄色", (250, 220, 40)), ("绿色", (50, 170, 60)), ("天蓝", (90, 205, 245)),
    ("宝蓝", (30, 65, 215)), ("紫色", (150, 45, 190)), ("粉色", (250, 150, 195)), ("黑色", (25, 25, 25)),
)  # fmt: skip

BRANDS = (
    ("云禾", "YUNHE"), ("木朴", "MUPU"), ("朗途", "LANGTU"), ("知夏", "ZHIXIA"),
    ("鹿野", "LUYE"), ("森谷", "SENGU"), ("贝甜", "BEITIAN"), ("九川", "JIUCHUAN"),
)  # fmt: skip

SERIES = ("星河", "拾光", "微风", "元气", "极简", "复古")

FLAVOURS = (
    "草莓", "芒果", "葡萄", "蜜桃", "荔枝", "菠萝", "椰子", "柠檬", "西瓜", "香蕉", "海盐", "芝士", "抹茶",
    "番茄", "烧烤", "麻辣",
)  # fmt: skip
MODELS = tuple(letter + digit for letter in "BDFKPRTX" for digit in "23456789")
CLOTHES = ("S", "M", "L", "XL", "2XL", "3XL")
SHOES = ("36", "37", "38", "39", "40", "41", "42", "43")
EDGES = ("30x30", "40x40", "45x45", "50x50", "60x60", "30x50", "40x60")

# How sellers write a value of a kind; {} is the value. Every writing of a kind names the value unmistakably.
WRITINGS = {
    "flavour": ("{}味", "{}", "{}口味", "{}风味"),
    "model": ("{}", "{}款", "{}型"),
    "clothes": ("{}码", "{}", "{}号"),
    "shoes": ("{}码", "{}", "{}号"),
    "edges": ("{}cm", "{}厘米", "{}CM"),
}
VALUES = {
    "flavour": FLAVOURS, "model": MODELS, "clothes": CLOTHES,
    "shoes": SHOES, "edges": EDGES,
}  # fmt: skip

# Per category: industry, id, path of names, what sellers call it, the (attribute key, kind of value) telling siblings.
CATEGORIES = {
    "bottle": ("食品饮料", "1101", "饮料>果汁", ("果汁", "果汁饮品"), ("口味", "flavour")),
    "bag": ("食品饮料", "1202", "零食>膨化", ("薯片", "土豆片"), ("口味", "flavour")),
    "box": ("食品饮料", "1203", "零食>饼干", ("饼干", "曲奇", "曲奇饼干"), ("口味", "flavour")),
    "shirt": ("服饰鞋包", "2101", "服装>上衣", ("上衣", "夏装", "女上衣"), ("尺码", "clothes")),
    "shoe": ("服饰鞋包", "2301", "鞋>休闲鞋", ("休闲鞋", "鞋子", "女鞋"), ("尺码", "shoes")),
    "pack": ("服饰鞋包", "2402", "箱包>旅行包", ("旅行包", "背包", "大容量包"), ("货号", "model")),
    "hat": ("服饰鞋包", "2503", "配饰>帽子", ("帽子", "遮阳帽", "潮帽"), ("货号", "model")),
    "cup": ("家居日用", "3101", "餐饮具>杯子", ("杯子", "水杯", "喝水杯"), ("型号", "model")),
    "cushion": ("家居日用", "3202", "家纺>抱枕", ("抱枕", "靠垫", "沙发靠枕"), ("尺寸", "edges")),
    "lamp": ("家居日用", "3303", "灯具>台灯", ("台灯", "小夜灯", "床头灯"), ("型号", "model")),
}  # fmt: skip

# Categories of text families; those whose key has more values come more often.
TEXT_MIX = ("bottle", "bag", "box", "bottle", "bag", "shirt", "shoe", "shoe", "pack", "hat", "cup", "lamp")
PICTURE_MIX = ("colour",) * 5 + ("pattern",)

PROMISES = (
    "包邮",
    "正品",
    "2022新款",
    "热卖",
    "促销",
    "特价",
    "现货速发",
    "限时折扣",
    "官方旗舰",
    "厂家直销",
    "＃爆款＃",
)
PRAISE = ("高颜值", "人气", "实惠", "家用", "学生", "送礼", "百搭", "精选", "轻奢", "ins风", "礼盒装", "高品质")
EMOJI = ("🔥", "✨", "🎁", "💯", "❤️")
# Other attributes. Values with separators inside are the reason why attributes are split before they are normalised.
VAGUE_COLOURS = ("如图", "图片款", "见主图", "如图;见详情", "款式：见图；现货")
FILLERS = (
    ("产地", ("浙江", "广东", "江苏", "福建")), ("上市时间", ("2022年春季", "2021年", "2022")),
    ("售后", ("七天无理由;运费险", "比例1:1 实拍", "以实物为准；谢谢")), ("适用人群", ("通用", "成人", "学生")),
)  # fmt: skip

# Four shapes a category on a 100 x 100 board: `r` rounded box (x0 y0 x1 y1 radius), `o` oval, `p` polygon, `a` arc
# (x0 y0 x1 y1 from to width). Small letters carry colour and pattern, capitals are trim. Shapes differ in parts, not in
# slimness: a picture is squashed to a square before the model sees it.
SHAPES = {
    "bottle": (
        "p 42 20 58 20 60 36 72 46 72 94 28 94 28 46 40 36; R 41 6 59 20 3",
        "p 36 20 54 20 58 34 70 42 70 94 20 94 20 42 32 34; R 34 6 56 20 3; A 52 44 92 86 270 90 7",
        "o 16 34 84 96; r 42 16 58 44 2; R 38 6 62 18 3",
        "r 26 10 74 94 10; R 26 8 74 18 4; R 26 86 74 96 4",
    ),
    "bag": (
        "r 18 18 82 86 2; R 18 8 82 18 0; R 18 86 82 96 0",
        "p 34 10 66 10 90 94 10 94; R 32 6 68 16 2",
        "r 22 30 78 96 14; R 16 10 84 32 5",
        "p 12 26 88 26 70 96 30 96; R 8 14 92 28 4",
    ),
    "box": (
        "r 8 36 84 88 2; P 8 36 22 20 96 20 84 36; P 84 36 96 20 96 74 84 88",
        "r 26 8 70 94 2; P 70 8 84 16 84 86 70 94",
        "o 8 10 92 92; O 40 42 60 60",
        "p 50 6 92 28 92 74 50 96 8 74 8 28; P 50 6 92 28 50 44 8 28",
    ),
    "shirt": (
        "p 34 14 66 14 97 32 86 52 74 42 74 92 26 92 26 42 14 52 3 32; O 40 8 60 22",
        "p 28 8 38 8 40 30 60 30 62 8 72 8 74 38 78 94 22 94 26 38",
        "p 34 10 66 10 82 18 98 88 84 92 74 46 74 92 26 92 26 46 16 92 2 88 18 18; O 40 4 60 18",
        "p 34 6 66 6 62 40 94 94 6 94 38 40; R 36 38 64 45 0",
    ),
    "shoe": (
        "p 8 36 34 36 56 54 90 62 94 76 6 76; R 4 76 96 88 4",
        "p 20 8 54 8 54 52 88 62 92 80 20 80; R 18 80 94 92 3",
        "p 6 26 26 36 58 66 96 72 96 84 62 84 30 58 22 64; P 8 36 22 54 18 92 12 92",
        "p 30 66 44 30 76 36 88 66; R 4 64 96 82 9",
    ),
    "pack": (
        "a 36 4 64 40 180 360 6; r 18 20 82 94 18; R 32 60 68 84 5",
        "a 30 6 70 74 180 360 6; p 10 38 90 38 82 96 18 96",
        "r 20 28 80 90 8; R 38 8 43 28 0; R 57 8 62 28 0; R 38 4 62 11 2; O 24 88 36 99; O 64 88 76 99",
        "A 14 4 86 84 180 360 5; r 8 44 92 92 6; P 8 44 92 44 50 72",
    ),
    "hat": (
        "p 12 64 14 40 30 22 54 18 72 30 78 64; P 58 58 99 68 97 78 54 72",
        "p 30 16 70 16 78 58 22 58; p 22 58 78 58 97 84 3 84; R 24 52 76 60 0",
        "r 28 8 72 76 3; r 4 72 96 86 5; R 28 60 72 72 0",
        "p 16 68 20 40 50 20 80 40 84 68; R 12 66 88 86 4; O 40 4 60 24",
    ),
    "cup": (
        "A 52 34 94 78 270 90 9; r 14 20 72 90 8",
        "p 16 30 84 30 68 78 32 78; R 4 80 96 90 5",
        "p 22 32 78 32 68 96 32 96; R 18 22 82 34 4; P 52 22 62 2 68 4 60 22",
        "p 18 8 82 8 68 54 32 54; R 46 54 54 84 0; R 26 84 74 93 3",
    ),
    "cushion": (
        "p 6 6 50 14 94 6 86 50 94 94 50 86 6 94 14 50",
        "o 6 6 94 94; O 44 44 56 56",
        "r 14 26 86 74 4; O 4 26 24 74; O 76 26 96 74",
        "o 6 12 53 58; o 47 12 94 58; p 11 46 89 46 50 94",
    ),
    "lamp": (
        "p 34 6 66 6 90 54 10 54; R 46 54 54 86 0; R 26 84 74 94 3",
        "o 20 4 80 64; R 44 62 56 84 0; R 28 82 72 94 4",
        "A 30 14 84 96 250 95 7; p 4 54 26 4 62 30; R 30 86 86 95 3",
        "r 24 26 76 84 6; R 18 84 82 94 2; P 18 28 50 6 82 28",
    ),
}


@dataclass(frozen=True, slots=True)
class Family:
    """Products that differ in one thing: `kind` is "text" or "picture"."""

    number: int
    kind: str
    differs: str  # "pattern" or "colour"; in a text family its value_kind
    split: str
    category: str
    name: tuple[tuple[str, str], str]  # brand (Chinese, Latin) and series
    key: str  # attribute key of the value that tells siblings of a text family
    value_kind: str


@dataclass(frozen=True, slots=True)
class Product:
    """What a listing sells: one value of its family's key and one look."""

    number: int
    family: Family
    value: str
    look: Look


@dataclass(frozen=True, slots=True)
class Listing:
    """One item line, as it will be written, and the truth behind it. `defect` names what is wrong with its picture."""

    product: Product
    row: dict[str, Any]
    image_name: str
    defect: str = ""

    @property
    def item_id(self) -> str:
        return str(self.row["item_id"])


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def deal(rng: Rng, options: Sequence[Any]) -> Iterator[Any]:
    """Endless shuffled decks: chance decides the order, no option stays unseen."""
    while True:
        for index in rng.permutation(len(options)):
            yield options[index]


def take_distinct(deck: Iterator[Any], count: int) -> list[Any]:
    """The next `count` different cards."""
    taken: list[Any] = []
    while len(taken) < count:
        card = next(deck)
        if card not in taken:
            taken.append(card)
    return taken


def choose(rng: Rng, options: list[Any], count: int) -> list[Any]:
    """`count` different options, or all when there are fewer."""
    return [options[index] for index in rng.permutation(len(options))[:count]]


def plan_products(rng: Rng, products: int) -> list[Product]:
    """Products, family by family; the two kinds of family alternate."""
    count = max(6, round(products / 4))
    sizes = [products // count + (index < products % count) for index in range(count)]
    for index in range(count - 2):  # families of 3 to 5 in either kind, not all of one size
        if index % 8 < 2 and sizes[index] == sizes[index + 2] == 4:
            sizes[index], sizes[index + 2] = 3, 5
    text_mix, categories = deal(rng, TEXT_MIX), deal(rng, list(CATEGORIES))
    pictured = deal(rng, PICTURE_MIX)
    names = deal(rng, list(itertools.product(BRANDS, SERIES)))
    drawn = []
    for number in range(count):
        kind = ("text", "picture")[number % 2]
        category = next(text_mix) if kind == "text" else next(categories)
        key, value_kind = CATEGORIES[category][4]
        differs = value_kind if kind == "text" else next(pictured)
        drawn.append((kind, differs, category, number, key, value_kind))
    split_of: dict[int, str] = {}
    for kind in ("text", "picture"):  # in the order of what tells siblings apart, so that no split lacks one
        for position, entry in enumerate(sorted(entry for entry in drawn if entry[0] == kind)):
            split_of[entry[3]] = SPLITS[position % len(SPLITS)]
    # Train has decks of its own: whatever the test split uses, train has seen as often as anything else.
    decks = {is_train: open_decks(rng) for is_train in (True, False)}
    result: list[Product] = []
    for (kind, differs, category, number, key, value_kind), size in zip(drawn, sizes, strict=True):
        family = Family(number, kind, differs, split_of[number], category, next(names), key, value_kind)
        result += plan_siblings(rng, family, size, len(result), decks[family.split == "train"])
    return result


def open_decks(rng: Rng) -> dict[str, Iterator[Any]]:
    """A deck for each thing in which siblings can differ."""
    decks = {name: deal(rng, options) for name, options in VALUES.items()}
    return decks | {"colours": deal(rng, range(len(COLOURS))), "patterns": deal(rng, PATTERNS)}


def plan_siblings(rng: Rng, family: Family, size: int, first: int, decks: dict[str, Iterator[Any]]) -> list[Product]:
    """The products of a family: one thing varies, everything else is the family's."""
    values = [pick(rng, VALUES[family.value_kind])] * size
    shapes = [int(rng.integers(4))] * size
    colours = [next(decks["colours"])] * size
    patterns = [next(decks["patterns"]) if rng.random() < 0.1 else "plain"] * size
    if family.differs == "pattern":
        patterns = take_distinct(decks["patterns"], size)
    elif family.differs == "colour":
        colours = take_distinct(decks["colours"], size)
    else:
        values = take_distinct(decks[family.value_kind], size)
    looks = zip(shapes, colours, patterns, strict=True)
    return [
        Product(first + index, family, value, (family.category, *look))
        for index, (value, look) in enumerate(zip(values, looks, strict=True))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def writings(family: Family, value: str) -> list[str]:
    """Every way in which a seller may write the family's value, before case and width."""
    return [form.format(value) for form in WRITINGS[family.value_kind]]


def full_width(text: str) -> str:
    """Latin letters and digits as ＡＢＣ１２３."""
    return "".join(chr(ord(char) + 0xFEE0) if char.isascii() and char.isalnum() else char for char in text)


def disguise(rng: Rng, text: str) -> str:
    """The same text in another case or width, now and then."""
    lot = rng.random()
    return full_width(text) if lot < 0.12 else text.lower() if lot < 0.3 else text


def write_row(rng: Rng, product: Product, image_name: str) -> dict[str, Any]:
    """The text fields of one listing; 1 in 200 hides what tells it from its siblings."""
    family = product.family
    industry, category_id, path, _, _ = CATEGORIES[family.category]
    in_title = rng.random() < 0.9
    in_attributes = rng.random() < (0.9 if in_title else 0.95)
    item_pvs, sku_pvs = write_attributes(rng, product, in_attributes)
    row: dict[str, Any] = {
        "industry_name": industry,
        "cate_id": category_id,
        "cate_name": path.split(">")[-1],
        "cate_id_path": f"{category_id[:2]}>{category_id}",
        "cate_name_path": path,
        "item_image_name": image_name,
        "title": write_title(rng, product, in_title),
        "item_pvs": item_pvs or pick(rng, (None, "", MISSING)),
        "sku_pvs": sku_pvs or pick(rng, (None, "", MISSING)),
    }
    optional = ["industry_name", "cate_id", "cate_name", "cate_id_path", "cate_name_path"]
    if in_attributes:
        optional.append("title")
    for field in optional:
        if rng.random() < 0.03:
            row[field] = pick(rng, (None, "", MISSING))
    return {field: value for field, value in row.items() if value != MISSING}


def write_title(rng: Rng, product: Product, with_value: bool) -> str:
    """A seller's title: the facts in any order, between promises."""
    family, ((chinese, latin), series) = product.family, product.family.name
    brand = pick(rng, (chinese, chinese, f"{chinese}{latin}", f"{latin}/{chinese}", f"{chinese} {latin}", latin, ""))
    facts = [brand, pick(rng, CATEGORIES[family.category][3])]
    if rng.random() < 0.75:
        facts.append(series + pick(rng, ("", "系列")))
    if with_value:
        value = disguise(rng, pick(rng, writings(family, product.value)))
        facts.append(value if rng.random() < 0.5 else family.key + value)
    facts += choose(rng, list(PRAISE), int(rng.integers(0, 2)))
    promises = choose(rng, list(PROMISES), int(rng.integers(0, 2)))
    facts = choose(rng, facts, len(facts))
    if promises and rng.random() < 0.5:
        facts.insert(0, f"【{promises.pop()}】")
    parts = facts + promises
    if rng.random() < 0.15:
        parts.append(pick(rng, [part for part in parts if part]))
    if rng.random() < 0.15:
        parts.insert(int(rng.integers(len(parts) + 1)), pick(rng, EMOJI))
    return disguise(rng, pick(rng, ("", "", " ", "  ")).join(part for part in parts if part))


def write_attributes(rng: Rng, product: Product, with_value: bool) -> tuple[str, str]:
    """(item_pvs, sku_pvs), either of them perhaps empty."""
    family, (brand, series) = product.family, product.family.name
    item: list[tuple[str, str]] = []
    sku: list[tuple[str, str]] = []
    if rng.random() < 0.7:
        item.append(("品牌", disguise(rng, pick(rng, (brand[0], "/".join(brand))))))
    if rng.random() < 0.4:
        item.append(("品名", pick(rng, CATEGORIES[family.category][3])))
    if rng.random() < 0.3:
        item.append(("系列", series))
    item += [(key, pick(rng, values)) for key, values in choose(rng, list(FILLERS), int(rng.integers(0, 3)))]
    if rng.random() < 0.5:
        # A colour word may stand only where siblings share the colour: in text families.
        is_named = family.kind == "text" and rng.random() < 0.3
        colours = (COLOURS[product.look[2]][0],) if is_named else VAGUE_COLOURS
        sku += [("颜色分类", colour) for colour in choose(rng, list(colours), int(rng.integers(1, 3)))]
    if with_value:
        forms = choose(rng, writings(family, product.value), 2 if rng.random() < 0.2 else 1)
        place = sku if rng.random() < 0.5 else item
        place += [(family.key, disguise(rng, form)) for form in forms]
    return join_attributes(rng, item), join_attributes(rng, sku)


def join_attributes(rng: Rng, attributes: list[tuple[str, str]]) -> str:
    """One string in the organiser's writing, or in one of the looser ones that occur."""
    lot = rng.random()
    inner, outer = ("#:#", "#;#") if lot < 0.75 else (":", ";") if lot < 0.88 else ("#:", ";")
    return outer.join(key + inner + value for key, value in choose(rng, attributes, len(attributes)))
