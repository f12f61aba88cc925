"""Every example that a --help or the README shows is typed as it stands, in a folder where what it goes on from is."""

import argparse
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
from safetensors.torch import save_file
from test_release import make_release
from worlds import TINY

from tongkuan import settings as config
from tongkuan.cli.verbs import VERBS, main, parser_of
from tongkuan.model import towers as model

TOP = Path(__file__).resolve().parents[2]
README = (TOP / "README.md").read_text(encoding="utf-8")
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
        ):
            type_in(f"{ENTRYPOINT} {words}")
    return top


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_help_works_as_it_stands_and_ends_in_what_to_type_next(
    verb: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo, tmp_path / "copy")
    monkeypatch.setenv("PYTHONPATH", f"{TOP}/code:{TOP}")  # as the shell script does, for ranks
    monkeypatch.chdir(tmp_path / "copy")
    type_in(parser_of(verb).example)
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert re.match(r"(# )?next: ", last), last


@pytest.mark.parametrize("verb", VERBS)
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


def readme_commands() -> list[str]:
    """The lines of its shell blocks that call a verb, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split(" # ")[0].split("     ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(ENTRYPOINT)]


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
    """The published preset for a small release whose encoders lie in `weights`, and a tiny one as `small`."""
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
    (folder / "small.yaml").write_text(TINY, encoding="utf-8")


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
    commands = [line for line in readme_commands() if line not in typed_by_ci]
    assert len(commands) > 10
    for line in commands:
        type_in(line.replace("FILE", "data/item_test_answers.jsonl"))


def test_the_readme_has_every_option_of_every_verb() -> None:
    table = "\n".join(map(options_row, VERBS))
    assert table in README, f"the README's table of options is to be\n{table}"


def test_the_errors_that_the_readme_explains_are_those_that_are_printed() -> None:
    section = README.partition("## When something is wrong")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    printed = [*TOP.glob("code/tongkuan/**/*.py"), *TOP.glob("data_scripts/**/*.py"), TOP / "entrypoint.sh"]
    # A message may be written over two lines.
    source = re.sub(r'"\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in printed))
    assert len(quoted) > 5
    assert [text for text in quoted if text not in source] == []


def options_row(verb: str) -> str:
    """A line of the README's table."""
    shown = []
    for action in parser_of(verb)._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = (
            action.metavar if isinstance(action.metavar, tuple) else [action.metavar or "|".join(action.choices or ())]
        )
        value = f" {' '.join(names)}" if action.nargs != 0 else ""
        name = f"`{action.option_strings[0]}{value}`" if action.option_strings else f"`{action.metavar}`"
        shown.append(f"{name} {action.help}".replace("|", "\\|"))
    return f"| `{verb}` | {'; '.join(shown) or 'none'} |"


def test_the_readme_has_every_setting() -> None:
    table = "\n".join(settings_rows(config.Settings, ""))
    assert table in README, f"the README's table of settings is to be\n{table}"


def settings_rows(section: type[config.Section], prefix: str) -> list[str]:
    """Lines of the README's table."""
    rows = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, config.Section):
            rows += settings_rows(inner, f"{prefix}{name}.")
            continue
        default = getattr(section(), name)
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        assert field.description, f"{prefix}{name} says nothing of itself"
        shown = "" if shown is None else f"`{shown}`"
        rows.append(f"| `{prefix}{name}` | {shown} | {field.description} |".replace("|", "\\|").replace("\\|", "|"))
    return rows
