"""Which of all listings of a split are the same product: embeddings, neighbours, pairs and groups, as Parquet.

`./entrypoint.sh match run --data data --split test --model weights/model.safetensors --out match`

    embeddings/part-NNNNNN.parquet  item_id, category, norm, e = [p ; q]
    neighbours/part-NNNNNN.parquet  of each distinct listing the nearest by cosine, by number
    labelled/part-NNNNNN.parquet    embeddings of labelled listings of valid, if the threshold is chosen on those
    pairs/part-NNNNNN.parquet       left < right, score, cosine, scaled cosine of what matches
    groups.parquet                  item_id, group_id (its smallest item_id), size, density, weakest score, mean cosine
    report.html                     the largest, the loosest and the surest groups, with pictures
    manifest.json                   what made them, and the recall as measured

Listings of bit-identical embeddings are one: pairs name the first of them, with which each other is paired.
Partition by partition: a killed run goes on from those that are there, and ends with the bytes of one never killed.
Many machines: `--partitions` or `--ray`, see docs/cluster.md.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tongkuan import __version__
from tongkuan.base.errors import UserError, clip
from tongkuan.base.files import check_target, sha256_of, sole_process
from tongkuan.encode.encode import batch_size, slow_precision
from tongkuan.encode.inference import Inference, open_inference, read_no_pairs
from tongkuan.encode.store import open_store
from tongkuan.match import calibrate
from tongkuan.match.embed import Encoded, encode_partitions, load
from tongkuan.match.files import Folder, partitions
from tongkuan.match.join import Join, Listings, Summary, Verdict, write_groups
from tongkuan.match.machines import HERE, Machines
from tongkuan.match.options import Options
from tongkuan.match.page import write_page
from tongkuan.match.scores import all_pairs
from tongkuan.match.threshold import Threshold, from_labels, from_sample, warning
from tongkuan.match.transaction import drop_changes, file_sums, write_manifest
from tongkuan.report.views import Pictures
from tongkuan.settings import Precision

EMBEDDINGS, LABELLED = "embeddings", "labelled"


def match_run(
    data_dir: Path,
    split: str,
    model_path: Path,
    out_dir: Path,
    options: Options,
    encode_batch: int | None = None,
    precision: Precision = "fp32",
    wanted: slice | None = None,
    ray_address: str | None = None,
    nproc: int | None = None,
) -> None:
    """Match all listings of a split and print what was found. UserError before any encoding when an input is unfit.

    Of `wanted` partitions only the embeddings; with `ray_address` the nodes of that cluster do the work.
    """
    folder = Folder(out_dir)
    for path in (folder.groups, folder.page, folder.manifest):
        check_target(path)
    with ExitStack() as stack:
        machines = stack.enter_context(open_machines(ray_address, nproc))
        with open_inference(data_dir, split, model_path, precision, encode_batch, read=read_no_pairs) as run:
            item_ids = list(run.items)
            if not item_ids:
                raise UserError(f"{run.files['items']}: no items; a catalogue needs one line an item")
            has_labels = options.threshold is None and wanted is None
            labelled = calibrate.labelled_items(data_dir, split, run.items) if has_labels else None
            if run.ranks.is_first:
                stack.enter_context(sole_process(out_dir, shared=wanted is not None))
                folder.manifest.unlink(missing_ok=True)  # until all that it speaks of is there
                drop_changes(folder)
                if line := slow_precision(run.ranks.device, run.precision):
                    print(line)
            size = options.partition_size
            encoded = encode_partitions(run, run.store, item_ids, folder, EMBEDDINGS, size, machines, wanted)
            if wanted is None:
                also = encode_labelled(run, data_dir, split, labelled, folder, machines)
        if not run.ranks.is_first:
            return
        if wanted is None:
            finish(run, data_dir, split, item_ids, folder, options, encoded, labelled, also, machines)
        else:
            print(progress_of(folder, len(partitions(len(item_ids), size)), wanted))


def open_machines(ray_address: str | None, nproc: int | None) -> AbstractContextManager[Machines]:
    """This machine, or the nodes of a cluster, where `nproc` ranks of this one have no place."""
    if ray_address is None:
        return nullcontext(HERE)
    if nproc not in (None, 1):
        raise UserError(f"--nproc {nproc}: ranks of this machine, and --ray takes a cluster's nodes; leave one out")
    from tongkuan.match.cluster import connect

    return connect(ray_address)


def progress_of(folder: Folder, count: int, wanted: slice) -> str:
    """Lines on what processes with partitions of their own have done so far."""
    done = len(range(count)[wanted])
    there = sum(folder.part(EMBEDDINGS, number).exists() for number in range(count))
    others = "" if there == count else "the other partitions, then "
    return (
        f"{folder.path / EMBEDDINGS}: {done:,} of {count:,} partitions done here, {there:,} are there\n"
        f"next: {others}the same command without --partitions"
    )


def encode_labelled(
    run: Inference,
    data_dir: Path,
    split: str,
    labelled: calibrate.LabelledItems | None,
    folder: Folder,
    machines: Machines,
) -> Encoded | None:
    """Labelled listings of another split, in a file of their own; None without such."""
    if labelled is None or labelled.split == split:
        if run.ranks.is_first:
            folder.drop_parts(LABELLED, 0)
        return None
    store = open_store(labelled.items, data_dir, run.card.settings, run.card.open_tokenizer(), cache_mb=0)
    return encode_partitions(run, store, labelled.item_ids, folder, LABELLED, len(labelled.item_ids), machines)


def finish(
    run: Inference,
    data_dir: Path,
    split: str,
    item_ids: list[str],
    folder: Folder,
    options: Options,
    encoded: Encoded,
    labelled: calibrate.LabelledItems | None,
    also: Encoded | None,
    machines: Machines,
) -> None:
    """From embeddings on the disk to groups and manifest, on one rank."""
    width = 2 * run.card.settings.embedding_size
    categories = [run.items[item_id].category if options.within == "category" else "" for item_id in item_ids]
    listings = Listings.of(item_ids, load(folder, EMBEDDINGS, encoded, len(item_ids), width), categories)
    join = Join.of(listings, encoded.sums, folder, options, machines)
    score_floor = float(run.card.threshold)
    threshold = choose(join, score_floor, options.threshold, labelled, folder, also)
    verdict = Verdict(score_floor, threshold.value)
    found = join.pairs(verdict)
    recall = join.measured_recall(found, verdict)
    summary = write_groups(join, found, verdict, options.groups)
    manifest: dict[str, Any] = {
        "tongkuan": __version__,
        "sha256": {name: sha256_of(run.files[name]) for name in ("model", "items")},
        "split": split,
        "precision": run.precision,
        "encode_batch": batch_size(run.settings, run.card.settings, run.ranks.device),
        "embeddings": encoded.sums,
        "blank_pictures": encoded.blank,
        "options": asdict(options),
        "engine": join.engine,
        "recall": {"of_matches": recall, "of_candidates": join.facts.get("recall", 1.0)},
        "probes": join.facts.get("probes"),
        "score_above": score_floor,
        "threshold": asdict(threshold),
        "counts": summary.counts,
        "files": file_sums(folder),
    }
    notes = list(warnings(manifest, summary))
    write_page(folder, run.items, Pictures(data_dir, encoded.blank), manifest, notes)
    write_manifest(folder, manifest)
    print("\n".join([*lines_on(folder, manifest), *notes, f"next: open {folder.page} in a browser"]))


def lines_on(folder: Folder, manifest: dict[str, Any]) -> Iterator[str]:
    """What to tell of a finished run."""
    counts, threshold = manifest["counts"], manifest["threshold"]
    yield (
        f"{folder.groups}: {counts['listings']:,} listings, {counts['pairs']:,} matches, "
        f"{counts['groups']:,} groups of two or more, the largest {counts['largest']:,}"
    )
    yield f"threshold {threshold['value']:.4f} of scaled cosines, {threshold['reason']}"
    yield f"and score above {manifest['score_above']:.4f}, the model's threshold"
    recall = manifest["recall"]["of_matches"]
    yield f"recall {recall:.4f} of matches, on a sample held against all listings; {manifest['engine']}"


def warnings(manifest: dict[str, Any], summary: Summary) -> Iterator[str]:
    """What a reader of the result must know."""
    blank = manifest["blank_pictures"]
    if large := summary.oversized:
        yield f"note: components split by a raised threshold first: {len(large):,}, the largest {large[0]:,} listings"
    if line := warning(summary.matches):
        yield line
    if blank:
        yield f"note: {len(blank)} pictures are missing or unreadable and count as blank, first {clip(blank[0])}"


def choose(
    join: Join,
    score_floor: float,
    given: float | None,
    labelled: calibrate.LabelledItems | None,
    folder: Folder,
    also: Encoded | None,
) -> Threshold:
    """The threshold as given, by labelled groups, or by a sample held against all."""
    if given is not None:
        return Threshold(given, "given", "as given")
    if labelled is None:
        rows = join.sample()
        return from_sample(all_pairs(join.catalogue, rows, score_floor, 0.0, is_upper=False).scaled, len(rows))
    if also is None:
        own = calibrate.rows_of(labelled, join.listings.item_ids, join.listings.numbers)
        embeddings, means = join.catalogue.embeddings[own], join.catalogue.means[own]
    else:
        width = join.catalogue.embeddings.shape[1]
        embeddings = load(folder, LABELLED, also, len(labelled.item_ids), width)
        means = calibrate.means_among(join.catalogue, embeddings)
    pairs = calibrate.labelled_pairs(labelled, embeddings, means, score_floor)
    return from_labels(pairs, len(join.listings.item_ids), labelled.split)
