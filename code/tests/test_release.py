"""release.py: a released checkpoint gives the numbers that transformers gives, and a damaged one is refused by name.

transformers itself is the oracle: its BertModel and SwinModel, put together by the paper's formula.
"""

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from PIL import Image
from release_worlds import WORDS, Payload, Release, make_release
from test_main import error_of
from transformers import AutoTokenizer, BertConfig
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from worlds import TINY, make_data

from tongkuan import TOP
from tongkuan.base.files import sha256_of
from tongkuan.cli.verbs import main
from tongkuan.model.modelfile import load_model, save_model
from tongkuan.model.towers import pair_scores
from tongkuan.records.attributes import TEN_KEYS, item_text, normalise
from tongkuan.records.items import Item, item_file, read_items
from tongkuan.records.result import read_predictions
from tongkuan.result.predict import predict

# What transformers and timm differ by, of numbers between -4 and 4 in fp32.
TOLERANCE = 2e-5
PARITY = [  # pixels, window, depths, heads, width
    pytest.param(32, 4, [2, 2], [1, 2], 8, id="map equals window in the last stage"),
    pytest.param(16, 4, [2], [2], 8, id="map equals window at once"),
    pytest.param(64, 4, [2, 1, 2], [1, 2, 4], 8, id="three stages"),
    pytest.param(40, 5, [2, 2], [2, 2], 8, id="window 5", marks=pytest.mark.slow),
    pytest.param(48, 6, [1, 3], [1, 2], 8, id="window 6", marks=pytest.mark.slow),
    pytest.param(56, 7, [2, 2], [1, 2], 12, id="window 7"),
    pytest.param(64, 8, [2, 2], [2, 4], 8, id="window 8", marks=pytest.mark.slow),
    pytest.param(72, 9, [2, 2], [1, 2], 8, id="window 9", marks=pytest.mark.slow),
    pytest.param(80, 10, [2, 2], [1, 2], 8, id="window 10", marks=pytest.mark.slow),
    pytest.param(88, 11, [2, 2], [1, 2], 8, id="window 11", marks=pytest.mark.slow),
    pytest.param(96, 12, [2, 2], [1, 2], 8, id="window 12"),
    pytest.param(36, 4, [1, 1], [1, 2], 8, id="odd maps, padded where nothing shifts"),
    pytest.param(48, 4, [2, 2], [1, 2], 8, id="shifted map, padded by half a window"),
    pytest.param(384, 12, [2, 2, 2, 2], [1, 1, 1, 1], 4, id="384 pixels, as published", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six items a split."""
    return make_data(tmp_path_factory.mktemp("release") / "data", num_products=2)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("original"))


@pytest.fixture
def release(original: Release, tmp_path: Path) -> Release:
    """A copy to spoil."""
    folder = tmp_path / "release"
    shutil.copytree(original.path.parent, folder)
    return replace(original, path=folder / original.path.name, encoder=folder / original.encoder.name)


@torch.inference_mode()
def by_formula(release: Release, item: Item, images: Path) -> np.ndarray:
    """[p ; q] of an item, straight from transformers: fc([CLS] ++ mean over tokens after the last LayerNorm)."""
    text = item_text(item, TEN_KEYS, "published")
    tokenizer = BertTokenizerLegacy(str(release.encoder / "vocab.txt"))
    ids = torch.tensor([tokenizer(text, truncation=True, max_length=140)["input_ids"]])
    with Image.open(images / item.image_name) as picture:
        rgb = picture.convert("RGB").resize((release.size, release.size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None] / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    halves = []
    for bert, swin, fc in release.towers:
        cls = bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
        mean = swin(pixel_values=pixels).last_hidden_state.mean(dim=1)
        halves.append(fc(torch.cat([cls, mean], dim=1)))
    return torch.cat(halves, dim=1)[0].numpy()


@pytest.mark.parametrize(("size", "window", "depths", "heads", "width"), PARITY)
def test_an_imported_release_gives_the_numbers_of_transformers(
    data: Path, tmp_path: Path, size: int, window: int, depths: list[int], heads: list[int], width: int
) -> None:
    release = make_release(tmp_path, size, window, depths, heads, width)
    assert main(release.words(tmp_path / "model.safetensors")) == 0
    predict(data, "test", tmp_path / "model.safetensors", tmp_path / "submit", 5)
    items = read_items(item_file(data, "test"))
    expected = {item_id: by_formula(release, item, data / "images") for item_id, item in items.items()}
    rows = [row for _, row in read_predictions(tmp_path / "submit" / "result.jsonl")]
    left, right = (
        np.stack([getattr(row, f"{side}_embedding") for row in rows]).astype(np.float32) for side in ("left", "right")
    )
    left_oracle, right_oracle = (np.stack([expected[getattr(row, side)] for row in rows]) for side in ("left", "right"))
    worst = max(np.abs(left - left_oracle).max(), np.abs(right - right_oracle).max())
    print(f"largest difference {worst:.1e} of numbers up to {np.abs(left_oracle).max():.1f}")
    assert worst <= TOLERANCE
    assert left_oracle.std(axis=0).max() > 0.05 and np.abs(left_oracle).max() < 10, "numbers that tell items apart"
    verdicts = pair_scores(left_oracle, right_oracle) > 0
    assert {row.threshold for row in rows} == {0.0}
    assert np.array_equal(pair_scores(left, right) > 0, verdicts)


def test_the_names_are_those_of_the_release(release: Release) -> None:
    names = torch.load(release.path, weights_only=True)["params"].keys()
    for name in (
        "txt_encoder1.embeddings.LayerNorm.weight",
        "txt_encoder2.encoder.layer.1.attention.self.query.bias",
        "img_encoder1.embeddings.patch_embeddings.projection.weight",
        "img_encoder1.embeddings.norm.bias",
        "img_encoder1.encoder.layers.0.blocks.0.attention.self.query.weight",
        "img_encoder1.encoder.layers.0.blocks.1.attention.self.relative_position_bias_table",
        "img_encoder2.encoder.layers.1.blocks.0.attention.output.dense.weight",
        "img_encoder2.encoder.layers.1.blocks.1.intermediate.dense.bias",
        "img_encoder2.encoder.layers.1.blocks.1.output.dense.bias",
        "img_encoder1.encoder.layers.0.blocks.0.layernorm_before.weight",
        "img_encoder1.encoder.layers.0.blocks.0.layernorm_after.weight",
        "img_encoder1.encoder.layers.0.downsample.reduction.weight",
        "img_encoder1.encoder.layers.0.downsample.norm.bias",
        "img_encoder1.layernorm.weight",
        "fc2.weight",
    ):
        assert name in names


def test_the_model_file_is_what_save_model_writes_and_says_its_source(release: Release, tmp_path: Path) -> None:
    for name in ("a", "b"):
        main(release.words(tmp_path / name, "--threshold", 1.65))
    model, card = load_model(tmp_path / "a")
    save_model(tmp_path / "c", model, card)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert card.threshold == 1.65
    assert card.facts == {"released_sha256": sha256_of(release.path), "preset": "ccks2022-63"}
    assert (card.settings.inputs, card.settings.attributes, card.settings.embedding_size) == ("both", "published", 6)
    assert card.settings.text.weights == "hub:hfl/chinese-roberta-wwm-ext", "no folder of this machine's"


def test_sizes_that_the_recipe_leaves_open_are_read_off_the_shapes(release: Release, tmp_path: Path) -> None:
    main(release.words(tmp_path / "named"))
    words = release.words(tmp_path / "read")[: -len(release.overrides())]
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(TINY.replace("convnext_atto", "swin_large_patch4_window12_384"), encoding="utf-8")
    main([*words, "--preset", str(tiny), "model.image.arguments={}"])
    (named, card), (read, card_read) = load_model(tmp_path / "named"), load_model(tmp_path / "read")
    assert card_read.settings.image.arguments == release.swin | {"img_size": 32, "patch_size": 4}
    assert card_read.text_config == card.text_config
    assert card_read.settings.attributes == "published"
    for tensor, other in zip(named.state_dict().values(), read.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)


def refused(words: list[str], out: Path) -> str:
    """The one line with which an import is refused; nothing may be left."""
    before = sorted(out.parent.iterdir())
    line = error_of(*words)
    assert sorted(out.parent.iterdir()) == before, "nothing is written"
    return line


def test_missing_unexpected_and_mis_shaped_keys_are_counted_and_named(release: Release, tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        for block in (0, 1):
            for row in ("query", "key"):
                del state[f"img_encoder2.encoder.layers.1.blocks.{block}.attention.self.{row}.bias"]
        state["img_encoder3.norm"] = torch.zeros(2)
        state["fc2.weight"] = torch.zeros(6, 5)

    release.change(spoil)
    line = refused(release.words(tmp_path / "model"), tmp_path / "model")
    assert re.search(
        r"release\.pth: keys 4 missing \(img_encoder2\..*query\.bias, .*key\.bias, .*query\.bias, …\)", line
    )
    assert "1 unexpected (img_encoder3.norm)" in line
    assert "1 of another shape (fc2.weight (6, 5) instead of (6, 32))" in line


def test_a_missing_block_is_no_smaller_network(release: Release, tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if re.search(r"layers\.1\.blocks\.1\.|encoder\.layer\.1\.", key)]:
            del state[key]

    release.change(spoil)
    line = refused(release.words(tmp_path / "model"), tmp_path / "model")
    assert f"{2 * (16 + 17)} missing (txt_encoder1.encoder.layer.1.attention.self.query.weight, " in line


def test_parts_are_joined_and_a_gap_is_named(release: Release, tmp_path: Path) -> None:
    main(release.words(tmp_path / "whole"))
    content = release.path.read_bytes()
    release.path.unlink()
    third = len(content) // 3
    parts = [release.path.with_name(f"release.pth.parta{letter}") for letter in "abc"]
    for number, part in enumerate(parts):
        part.write_bytes(content[number * third : (number + 1) * third if number < 2 else None])
    (tmp_path / ".joined0.joined.part").write_bytes(b"what a killed run leaves")
    for number, name in enumerate((release.path, parts[0])):
        words = release.words(tmp_path / f"joined{number}")
        words[words.index("--model") + 1] = str(name)
        main(words)
        assert (tmp_path / f"joined{number}").read_bytes() == (tmp_path / "whole").read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["joined0", "joined1", "release", "whole"], "the joined file is gone"
    parts[2].rename(parts[2].with_name("release.pth.partad"))
    line = refused(release.words(tmp_path / "model"), tmp_path / "model")
    assert "release.pth.partac: this part is missing, release.pth.partad is there" in line
    parts[2].with_name("release.pth.partad").unlink()
    assert "not a whole torch file" in refused(release.words(tmp_path / "model"), tmp_path / "model")
    for part in parts[:2]:
        part.unlink()
    assert "no such file, nor parts" in refused(release.words(tmp_path / "model"), tmp_path / "model")


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_payload_is_refused_and_never_run(release: Release, tmp_path: Path, form: str) -> None:
    content = {"params": {"fc1.weight": torch.zeros(2)}, "more": Payload(tmp_path / "ran")}
    if form == "torch":
        torch.save(content, release.path)
    else:
        release.path.write_bytes(pickle.dumps(content))
    line = refused(release.words(tmp_path / "model"), tmp_path / "model")
    assert "release.pth: damaged, or holds more than tensors" in line
    pickle.loads(pickle.dumps(content["more"]))
    assert (tmp_path / "ran").exists(), "it would have run"


def test_a_file_that_is_no_checkpoint_is_one_line(release: Release, tmp_path: Path) -> None:
    content = release.path.read_bytes()
    for spoiled in (content[:-200], content[: len(content) // 2], b"", b"<html>404</html>"):
        release.path.write_bytes(spoiled)
        assert "fetch the released file again" in refused(release.words(tmp_path / "model"), tmp_path / "model")
    torch.save({"params": {"step": 3}}, release.path)
    assert "nor a state_dict" in refused(release.words(tmp_path / "model"), tmp_path / "model")


@pytest.mark.parametrize(("size", "window"), [(32, 8), (40, 7), (38, 4)])
def test_maps_on_which_timm_and_transformers_differ_are_refused(tmp_path: Path, size: int, window: int) -> None:
    release = make_release(tmp_path / "release", size, window)
    line = refused(release.words(tmp_path / "model"), tmp_path / "model")
    assert f"model.image.size {size}: makes a map of " in line and f"windows of {window} do not tile" in line
    if window == 8:  # no checkpoint can come from a map smaller than its window
        with pytest.raises(RuntimeError):
            release.towers[0][1](torch.zeros(1, 3, size, size))


def test_a_network_that_is_no_swin_is_refused(release: Release, tmp_path: Path) -> None:
    words = [*release.words(tmp_path / "model"), "model.image.architecture=resnet18", "model.image.arguments={}"]
    assert "a released checkpoint holds Swin" in refused(words, tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------------------
# The text encoder


@pytest.fixture
def weights_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights/ of its own, and a hub that is switched off."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr("tongkuan.model.encoders.WEIGHTS_DIR", folder)
    monkeypatch.setattr("tongkuan.model.released.WEIGHTS_DIR", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return folder


def without_encoder(words: list[str]) -> list[str]:
    """The import with the text encoder that the preset names."""
    start = words.index("--text-encoder")
    return words[:start] + words[start + 2 :]


def test_a_text_encoder_that_is_nowhere_is_one_line(release: Release, weights_dir: Path, tmp_path: Path) -> None:
    words = without_encoder(release.words(tmp_path / "model"))
    line = refused(words, tmp_path / "model")
    assert line.startswith("encoder hfl/chinese-roberta-wwm-ext: ")
    local = weights_dir / "chinese-roberta-wwm-ext"
    assert f"put config.json and vocab.txt of hfl/chinese-roberta-wwm-ext into {local}" in line
    release.encoder.rename(local)
    main(words)
    assert load_model(tmp_path / "model")[1].tokenizer is not None


def test_a_folder_that_is_not_the_checkpoints_text_encoder_is_refused(release: Release, tmp_path: Path) -> None:
    vocabulary, config = release.encoder / "vocab.txt", release.encoder / "config.json"
    with vocabulary.open("a", encoding="utf-8") as file:
        file.write("多\n")
    line = refused(release.words(tmp_path / "model"), tmp_path / "model")
    assert f"{len(WORDS.split()) + 1} words, the checkpoint has {len(WORDS.split())}" in line
    settings = orjson.loads(config.read_bytes())
    vocabulary.write_text("\n".join(WORDS.split()) + "\n", encoding="utf-8")
    config.write_bytes(orjson.dumps(settings | {"intermediate_size": 32}))
    line = refused(release.words(tmp_path / "model"), tmp_path / "model")
    assert "intermediate.dense.weight (24, 16) instead of (32, 16)" in line
    for file in (vocabulary, config):
        file.unlink()
        line = refused(release.words(tmp_path / "model"), tmp_path / "model")
        assert f"no {file.name} there; put config.json and vocab.txt of hfl/chinese-roberta-wwm-ext into" in line


def test_encoders_are_fetched_ahead_unless_present(weights_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = weights_dir / "swin_large_patch4_window12_384.ms_in22k"
    text = weights_dir / "chinese-roberta-wwm-ext"
    text.mkdir()
    line = error_of("weights")
    assert re.search(rf"encoder timm/{image.name}: not in .* download it to {re.escape(str(image))}", line)
    assert f"present in {text}" in capsys.readouterr().out
    assert list(weights_dir.iterdir()) == [text], "nothing is left of the attempt"
    image.mkdir()
    assert main(["weights", "--preset", "ccks2022-64"]) == 0
    assert f"present in {image}" in capsys.readouterr().out
    assert main(["weights", "--preset", "demo"]) == 0
    assert capsys.readouterr().out.count("nothing to fetch") == 2


def test_a_fetched_encoder_appears_whole(weights_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, local_dir: Path, ignore_patterns: list[str]) -> str:
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / "config.json").write_text(name, encoding="utf-8")
        return str(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert main(["weights"]) == 0
    found = sorted(str(path.relative_to(weights_dir)) for path in weights_dir.rglob("*"))
    names = ("chinese-roberta-wwm-ext", "swin_large_patch4_window12_384.ms_in22k")
    assert found == sorted([*names, *(f"{name}/config.json" for name in names)])


VOCABULARIES = [None, *sorted((TOP.parent / "shared" / "data" / "vocab").glob("*_vocab.txt"))]
TEXTS = [
    "正品 iPhone 14 Pro Café（大）杯子 500ml",
    "ＡＢＣ①㎏ ﬁne Ⅳ 號碼　全角　空格",
    "naïve\u0301 ÀÉÎ Straße İstanbul ǅ",
    "#1:#2;3//a-b_c+100% 【新品】《书》￥99.9元",
    "emoji 😀👍🏽 \u200b\ufeff\u00ad\t\r\n零宽",
    "日本語カタカナ ｶﾀｶﾅ 한국어 𠮷野家",
    "",
    "杯" * 300,
    "supercalifragilistic" * 8,
]


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda path: path.stem if path else "small")
def test_texts_become_the_tokens_of_the_reference_tokenizer(tmp_path: Path, vocabulary: Path | None) -> None:
    words = vocabulary.read_text(encoding="utf-8") if vocabulary else "\n".join(WORDS.split()) + "\n"
    (tmp_path / "vocab.txt").write_text(words, encoding="utf-8")
    BertConfig(vocab_size=words.count("\n")).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    fast.enable_truncation(140)
    reference = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    for raw in TEXTS:
        for text in (raw, normalise(raw), item_text(Item("a", raw, "型号#:#A1#;#品牌#:#＃杯"), TEN_KEYS, "published")):
            ids = fast.encode(text).ids
            assert ids == reference(text, truncation=True, max_length=140)["input_ids"], text
            assert len(ids) <= 140 and ids[0] == fast.token_to_id("[CLS]")
    assert fast.encode(normalise("ＩＰＨＯＮＥ １４")).tokens == fast.encode("iphone 14").tokens
    assert fast.encode("Cafés").tokens[1] == "cafe", "word pieces, lower case, no accents"
