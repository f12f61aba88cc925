"""One self-contained HTML page of a scored result: figures, curves, a slider, pictured pairs, problems in the data.

`./entrypoint.sh report --submit submit --pairs data/item_valid_pair.jsonl --data data --run runs/small`
"""

from pathlib import Path
from typing import Any

from tongkuan.base.errors import UserError
from tongkuan.base.files import check_writable, publish
from tongkuan.base.metrics import quality_at
from tongkuan.records.result import read_manifest
from tongkuan.records.rows import read_rows
from tongkuan.report import charts, content, figures
from tongkuan.report.page import render
from tongkuan.report.problems import contradictions, read_sides, twins
from tongkuan.report.result import aligned_margins, find_items, read_scored
from tongkuan.report.template import flat
from tongkuan.report.views import Pictures


def report(
    submit_dir: Path,
    pairs_path: Path,
    data_dir: Path,
    out: Path,
    run_dir: Path | None = None,
    against_dir: Path | None = None,
) -> None:
    """Score the result as the judges do and publish the page. UserError before that when an input is unfit."""
    if out.suffix != ".html" or out.is_dir():
        raise UserError(f"{out}: no name for a page; let --out end in .html")
    check_writable(out.parent)
    curves = read_curves(run_dir) if run_dir else []
    manifest = read_manifest(submit_dir) or {}
    result = read_scored(submit_dir, pairs_path)
    items = find_items(data_dir, result.pairs, manifest)
    blank = manifest.get("blank_pictures")
    pictures = Pictures(data_dir, blank if isinstance(blank, list) else ())
    compared = None
    notes = list(result.notes)
    if against_dir:
        against = read_scored(against_dir, pairs_path)
        compared = figures.compare(result.margins, aligned_margins(result, against), result.labels)
        notes += [f"{named(against_dir)}: {note}" for note in against.notes if note not in notes]
    probability = figures.calibrated(result.scores, result.labels, are_log_odds=result.commodity is not None)
    subject = content.Subject(result, items, pictures, manifest, compared, probability)
    # First, for it finds pictures that cannot be read, and the rest counts them as missing.
    shown, images = content.encode_pictures(subject)
    num_pictured = len(shown) if images else 0  # a catalogue of texts alone
    problems = contradictions(read_sides(data_dir, pairs_path, result.pairs))
    facts = {
        **content.headline(subject),
        **content.problems(problems, twins(data_dir, pictures), pictures),
        "names": {"pairs": pairs_path.name, "submit": named(submit_dir), "against": named(against_dir)},
        "notes": notes,
        "curves": [title for title, _ in curves],
        "manifest": flat(manifest),
        "hashes": content.hashes(submit_dir, manifest),
    }
    data = content.data(subject, shown)
    data["charts"] |= {f"training-{number}": chart for number, (_, chart) in enumerate(curves)}
    page = render("page.html.j2", facts | {"num_pictured": num_pictured}, data, images)
    with publish(out) as file:
        file.write(page)
    quality = quality_at(result.scores, result.labels, result.thresholds)
    print(f"{out}: {quality} on {len(result.pairs)} pairs, {num_pictured} with pictures, {len(page) / 1e6:.1f} MB")
    print(probability)
    for note in notes:
        print(note)
    print("next: open it in a browser; it needs no network")


def read_curves(run_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """(title, chart) of what a run has logged."""
    advice = "name the folder that train --run wrote to"
    return charts.training([row for _, row in read_rows(run_dir / "metrics.jsonl", advice)])


def named(folder: Path | None) -> str:
    """A folder's own name: where it lies is nobody's business but the user's."""
    return folder.resolve().name if folder else ""
