"""Fuzz the two readers of strangers' text by coverage, with atheris (not in the lock: it is for these runs only).

`pip install --target FOLDER atheris`, then from the top
`PYTHONPATH=code:FOLDER .venv/bin/python code/tests/fuzz.py attributes -max_total_time=300`, likewise with `result`.
It ends with a traceback and the input in a file `crash-…` when a target raises anything but a UserError of one line,
or when what it gives is not what it promises. Further words are libFuzzer's options.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[f"tongkuan.records.{name}" for name in ("items", "attributes", "attribute_syntax")]
):
    from tongkuan.records import attributes as readings
    from tongkuan.records import items as records
from tongkuan.base.errors import UserError


def attributes(data: bytes) -> None:
    """Any text: keys and values come back cleaned, distinct and not empty."""
    text = data.decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 become lone surrogates
    for style in ("quoted", "published"):
        for key, values in readings.parse_attributes(text, style).items():
            assert key == readings.normalise(key) and key
            assert values and len(set(values)) == len(values)
            assert all(value and value == readings.normalise(value) for value in values)
        readings.item_text(records.Item("1", text, text, text), ("型号", text), style)


def result(data: bytes) -> None:
    """Any bytes: a UserError of one line, or the numbers that the judges' json gives."""
    RESULT.write_bytes(data)
    try:
        rows = [row for _, row in records.read_predictions(RESULT)]
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 500
        return
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    for line, row in zip(lines, rows, strict=True):
        told = json.loads(line)
        assert row.left_embedding.tolist() == [float(number) for number in json.loads(told["src_item_emb"])]
        assert row.threshold == float(told["threshold"])


TARGETS = {"attributes": attributes, "result": result}
SEEDS = {
    "attributes": [
        "品牌#:#Nike#;#货号#:#A-1",
        "a#:1；2;b:3",
        "＃：；#;#:#",
        '[{"name":"a","value":[1]}]',
        "a=1<br>b=&amp;",
    ],
    "result": [
        '{"src_item_id":"a","src_item_emb":"[0.5,1]","tgt_item_id":"b","tgt_item_emb":"[2,-3e-9]","threshold":1.65}\n',
        '\ufeff{"src_item_id":1,"src_item_emb":"[1]","tgt_item_id":"b","tgt_item_emb":"[]","threshold":0}\r\n\n',
    ],
}

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        RESULT = Path(folder) / "result.jsonl"
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS[name]):
            (corpus / str(number)).write_text(seed, encoding="utf-8")
        atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
        atheris.Fuzz()
