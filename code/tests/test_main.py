"""The verbs as a user meets them: bad input is one clear line and exit code 2."""

from pathlib import Path

import pytest
from commands import ok, run_verb, without_root
from worlds import make_data, train_words, write_jsonl

from tongkuan.base.errors import UserError
from tongkuan.cli.verbs import VERBS, main


def error_of(*words: object) -> str:
    """The line a user sees."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in words])
    text = str(caught.value)
    assert "\n" not in text
    return text


def predict(data: Path, model: Path, submit: Path) -> tuple[object, ...]:
    return ("predict", "--data", data, "--model", model, "--submit", submit)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A data folder to spoil."""
    return make_data(tmp_path / "data", num_products=2)


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_without_a_verb_it_says_what_there_is() -> None:
    out = ok(run_verb())
    assert all(f"  {verb}" in out for verb in [*VERBS, "test"])


def test_a_users_error_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path) -> None:
    done = run_verb("check", "--submit", tmp_path, "--pairs", tmp_path / "none.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "no such file" in done.stderr


def test_an_unknown_verb_or_option_is_answered_with_the_nearest() -> None:
    assert "did you mean 'predict'?" in error_of("predcit")
    assert "did you mean '--submit'?" in error_of("check", "--submti", "x", "--pairs", "y")


def test_an_unknown_item_id_names_line_and_nearest(own: Path, model: Path, tmp_path: Path) -> None:
    append(own / "item_test_pair.jsonl", '{"src_item_id":"test-0-0","tgt_item_id":"test-0-00"}\n')
    line = error_of(*predict(own, model, tmp_path / "s"))
    assert "item_test_pair.jsonl:9: unknown item 'test-0-00'" in line and "item_test_info.jsonl" in line


def test_a_broken_json_line_is_named(own: Path, model: Path, tmp_path: Path) -> None:
    append(own / "item_test_info.jsonl", '{"item_id": "x", \n')
    assert "item_test_info.jsonl:7: not a JSON line" in error_of(*predict(own, model, tmp_path / "s"))


def test_a_label_that_is_neither_0_nor_1_is_named(own: Path, tmp_path: Path) -> None:
    append(own / "item_train_pair.jsonl", '{"src_item_id":"train-0-0","tgt_item_id":"train-0-1","item_label":"2"}\n')
    assert "item_train_pair.jsonl:9: item_label must be 0 or 1, found '2'" in error_of(*train_words(tmp_path, own))


def test_an_empty_pair_file_is_named(own: Path, model: Path, tmp_path: Path) -> None:
    write_jsonl(own / "item_test_pair.jsonl", [])
    assert "item_test_pair.jsonl: no pairs" in error_of(*predict(own, model, tmp_path / "s"))


def test_a_missing_model_names_the_verb_that_makes_one(own: Path, tmp_path: Path) -> None:
    assert "no such model; run ./entrypoint.sh train" in error_of(*predict(own, tmp_path / "no", tmp_path / "s"))


def test_missing_data_names_the_verbs_that_bring_some(model: Path, tmp_path: Path) -> None:
    assert "./entrypoint.sh" in error_of(*predict(tmp_path / "none", model, tmp_path / "s"))
    assert "./entrypoint.sh" in error_of(*train_words(tmp_path, tmp_path / "none"))


def test_an_unknown_setting_is_answered_with_the_nearest(own: Path, tmp_path: Path) -> None:
    line = error_of(*train_words(tmp_path, own, "train.stepz=3"))
    assert "unknown setting 'train.stepz' (did you mean 'steps'?)" in line


def test_a_read_only_submit_folder_is_refused_before_any_work(own: Path, model: Path, tmp_path: Path) -> None:
    submit = tmp_path / "submit"
    submit.mkdir()
    submit.chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders are private to root
        if folder.stat().st_mode & 0o005 != 0o005 and folder != Path("/"):
            folder.chmod(0o755)
    with without_root():
        line = error_of(*predict(own, model, submit))
    assert f"{submit}: cannot write here" in line
    assert list(submit.iterdir()) == []


def test_nothing_is_left_behind_after_a_users_error(own: Path, model: Path, tmp_path: Path) -> None:
    append(own / "item_test_pair.jsonl", "nonsense\n")
    error_of(*predict(own, model, tmp_path / "s"))
    assert list((tmp_path / "s").iterdir()) == []
