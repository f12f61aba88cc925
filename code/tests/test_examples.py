"""Every example of a --help or the README works as it stands; documents say the same as the code and each other."""

import functools
import http.server
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from docs.reference import COMMAND, NAMES, REFERENCE, options_of, reference, setting_rows
from release_worlds import make_release
from safetensors.torch import save_file
from test_layers import ROOMS
from worlds import ONE, tiny_preset

from tongkuan import presets as config
from tongkuan.cli.verbs import main, parser_of
from tongkuan.model import encoders as model
from tongkuan.records.items import read_items

TOP = Path(__file__).resolve().parents[2]
README, CHINESE = ((TOP / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
README_WORDS = 1_400
CODE_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
ENTRYPOINT = "./entrypoint.sh"
SCREEN = 32  # lines


def type_in(line: str) -> None:
    """A line of commands, each as the shell would hand it over."""
    for command in line.split("&&"):
        program, *words = shlex.split(command, comments=True)
        assert program == ENTRYPOINT
        assert main(words) == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the demo leaves, of fewer products and steps."""
    top = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        for words in (
            "sample --raw runs/demo/raw --products 60",
            "resize --raw runs/demo/raw --data runs/demo/data --size 96",
            "split --data runs/demo/data",
            "train --preset demo --data runs/demo/data --run runs/demo/train "
            "--model runs/demo/weights/model.safetensors train.steps=20",
            "predict --data runs/demo/data --model runs/demo/weights/model.safetensors --submit runs/demo/submit",
            "match run --data runs/demo/data --model runs/demo/weights/model.safetensors --out runs/demo/match",
        ):
            type_in(f"{ENTRYPOINT} {words}")
    return top


@pytest.mark.slow
@pytest.mark.parametrize("verb", [name for name in NAMES if name != "match store"])  # asks for a server: test_stores.py
def test_the_example_of_a_help_works_as_it_stands_and_ends_in_what_to_type_next(
    verb: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo, tmp_path / "copy")
    monkeypatch.setenv("PYTHONPATH", f"{TOP}/code:{TOP}")  # as the shell script does, for ranks
    monkeypatch.chdir(tmp_path / "copy")
    (item_id, *_) = read_items(Path("runs/demo/data/item_test_info.jsonl"))
    type_in(re.sub(r"\bID\b", item_id, parser_of(verb).example))
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert re.match(r"(# )?next: ", last), last


@pytest.mark.parametrize("verb", NAMES)
def test_a_help_fits_a_screen_and_ends_in_its_example(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.count("\n") <= SCREEN
    assert out.splitlines()[-1].strip() == parser_of(verb).example
    assert parser_of(verb).example.startswith(f"{ENTRYPOINT} {verb}")


# ---------------------------------------------------------------------------------------------------------------------
# README


def shell_lines(text: str) -> list[str]:
    """The lines of its shell blocks without their comments, and a rule after each block."""
    blocks = (f"{block}---" for block in CODE_BLOCK.findall(text))
    return [re.sub(r"\s+# .*", "", line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def links(demo: Path, tmp_path: Path) -> Iterator[str]:
    """The list of the demo's raw files on a server of this machine."""
    folder = shutil.copytree(demo / "runs/demo/raw", tmp_path / "served")
    # A folder of pictures has no link.
    shutil.make_archive(str(folder / "item_test_images"), "zip", folder / "item_test_images")
    names = [path.name for path in sorted(folder.iterdir()) if re.search(r"_(info|pair)\.jsonl$|\.zip", path.name)]

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "".join(f"{name} http://127.0.0.1:{server.server_port}/{name}\n" for name in names)
        server.shutdown()


def small_presets(folder: Path, weights: Path) -> None:
    """The published preset for a small release whose encoders lie in `weights`, and a tiny one tower as `best`."""
    release = make_release(folder / "release")
    shutil.copy(release.path, weights / "63_grad_clip_norm_0.5_net_64000.pth")
    text, image = weights / "chinese-roberta-wwm-ext", weights / "swin_large_patch4_window12_384.ms_in22k"
    release.towers[0][0].save_pretrained(text)
    shutil.copy(release.encoder / "vocab.txt", text)
    image.mkdir()
    size = f"model.image.size={release.size}"
    steps = ("train.steps=4", "train.validate_every=2", "train.save_every=2")
    resolved = config.resolve("ccks2022-63", [*release.overrides(), size, "model.embedding_size=6", *steps])
    encoder = resolved.settings.model.image
    save_file(
        timm.create_model(encoder.architecture, num_classes=0, **encoder.arguments).state_dict(),
        image / "it.safetensors",
    )
    (folder / "ccks2022-63.yaml").write_text(config.describe(resolved), encoding="utf-8")
    one = config.resolve(str(tiny_preset(folder)), ONE)
    (folder / "best.yaml").write_text(config.describe(one), encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_readme_works_as_it_stands(
    demo: Path, links: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against small presets of the same names; what FILE stands for is a file with answers."""
    weights = tmp_path / "weights"
    weights.mkdir()
    small_presets(tmp_path, weights)
    monkeypatch.setattr(config, "PRESET_DIR", tmp_path)
    monkeypatch.setattr(model, "WEIGHTS_DIR", weights)
    shutil.copytree(demo / "runs/demo/raw", tmp_path / "my/raw")
    (tmp_path / "links.txt").write_text(links, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    typed_by_ci = {f"{ENTRYPOINT} demo", f"{ENTRYPOINT} test"}
    commands = [line for line in shell_lines(README) if line.startswith(ENTRYPOINT) and line not in typed_by_ci]
    assert len(commands) > 10
    for line in commands:
        type_in(line.replace("FILE", "data/item_test_answers.jsonl"))


def test_the_readme_is_short_and_the_chinese_one_says_the_same() -> None:
    """Commands, figures, headings, pictures and links; the prose is a translator's."""
    assert len(README.split()) <= README_WORDS
    assert "(README.zh.md)" in README and "(README.md)" in CHINESE
    for facts_of in (shell_lines, figures, headings, links_of):
        assert facts_of(CHINESE) == facts_of(README)


def figures(text: str) -> list[str]:
    """Its numbers of two digits or more outside shell blocks; a language puts them in an order of its own."""
    return sorted(re.findall(r"\.?\d[\d.,]*\d", CODE_BLOCK.sub("", text)))


def headings(text: str) -> list[int]:
    """The level of each heading, in order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", CODE_BLOCK.sub("", text), re.MULTILINE)]


def links_of(text: str) -> list[str]:
    """Where its links and pictures lead, in order, but for the other language."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("README")]


# ---------------------------------------------------------------------------------------------------------------------
# Other documents


@pytest.mark.parametrize("path", [TOP / "README.md", TOP / "README.zh.md", *sorted(REFERENCE.parent.glob("*.md"))])
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in links_of(path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if target.startswith("https://") or "figures/" in name:  # the image has no pictures of documents
            continue
        found = path.parent / name
        assert found.is_file(), target
        titles = re.findall(r"^#+ (.+)", found.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], target


def test_the_reference_is_that_of_todays_options_and_settings() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), f"{REFERENCE} is out of date; mend it: {COMMAND}"


def test_every_option_and_setting_says_what_it_is() -> None:
    assert [name for name in NAMES for action in options_of(parser_of(name)) if not action.help] == []
    assert [name for name, _, what in setting_rows(config.Settings, "") if not what] == []


def test_the_errors_that_are_explained_are_those_that_are_printed() -> None:
    page = (REFERENCE.parent / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    printed = [*TOP.glob("code/tongkuan/**/*.py"), *TOP.glob("data_scripts/**/*.py"), TOP / "entrypoint.sh"]
    # A message may be written over two lines.
    source = re.sub(r'"\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in printed))
    assert len(quoted) > 5
    assert [text for text in quoted if text not in source] == []


def test_the_map_of_the_code_names_files_that_are_there_and_all_rooms() -> None:
    page = (TOP / "code/CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|yaml|sh))`", page))
    folders = (TOP / "code/tongkuan", TOP / "code", TOP)
    assert len(named) > 20
    assert {name for name in named if not any((folder / name).is_file() for folder in folders)} == set()
    assert re.findall(r"^\d+\. `(\w+)(?:/|\.py)`", page, re.MULTILINE) == ROOMS
