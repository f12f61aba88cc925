"""The verbs on a whole catalogue, and `export`, whose file answers for one without torch."""

from pathlib import Path

from tongkuan.base.numbers import Whole
from tongkuan.cli import options as opt
from tongkuan.cli.options import Option, switch
from tongkuan.cli.verb import ANSWERS, DEMO_DATA, DEMO_MODEL, MATCHED, Verb
from tongkuan.match.options import STORE_TOKEN

MATCH = """\
A match: score above the model's threshold, 2 cos(a, b) - m(a) - m(b) above T; m: mean of 10 nearest.

"""

STORE = f"""\
The server's token, if it asks for one: environment, {STORE_TOKEN}. Needs pymilvus:
.venv/bin/python -m pip install --no-deps --require-hashes -r code/milvus.lock

"""

GROWN = """\
New listings are held against all and each other. m of old ones stays as it was until the next match run.
Only groups that a match leads to change; ids stay; DIR/changes lists whose group changed.

"""


CATALOGUE_VERBS = {
    "match run": Verb(
        "which of all listings are the same product; the same command resumes",
        f"match run {DEMO_DATA} {DEMO_MODEL} --out runs/mine/match",
        (
            opt.DATA,
            opt.SPLIT,
            opt.MODEL,
            opt.OUT.but("its files", metavar="DIR", parameter="out_dir", default=Path("match")),
            opt.WITHIN,
            opt.CANDIDATES,
            opt.SCALED,
            opt.RECALL,
            opt.ENGINE,
            opt.GROUPS,
            opt.PARTITION_SIZE,
            opt.PARTITIONS,
            opt.RAY,
            opt.PRECISION.but("of the encoders", default="fp32"),
            opt.ENCODE_BATCH,
            opt.NPROC,
            opt.DRY_RUN,
        ),
        "tongkuan.match.run:match_run",
        instead={"dry_run": "tongkuan.dryrun:dry_run_matching"},
        derived={"options": "tongkuan.match.options:Options"},
        outputs=("out_dir",),
        has_ranks=True,
        more=MATCH,
    ),
    "match add": Verb(
        "add listings to what match run made, or update them; the same command resumes",
        f"match add --items runs/demo/data/item_valid_info.jsonl {DEMO_DATA} {DEMO_MODEL} {MATCHED}",
        (
            Option("--items", "items_path", "FILE", "new or changed listings", more={"required": True}),
            opt.DATA.but("its images/ has their pictures"),
            opt.MODEL.but("that match run was given"),
            opt.MATCHED,
        ),
        "tongkuan.match.add:match_add",
        outputs=("out_dir",),
        more=GROWN,
    ),
    "match remove": Verb(
        "remove listings from what match run made",
        f"match remove ID {MATCHED}",
        (
            Option("", "item_ids", "ID", "listings to remove", type=None, more={"nargs": "*"}),
            Option("--ids", "ids_path", "FILE", "more of them, an id a line or a file of items"),
            opt.MATCHED,
        ),
        "tongkuan.match.add:match_remove",
    ),
    "match query": Verb(
        "the nearest listings of a stored or a new one",
        f"match query --top 5 {MATCHED}",
        (
            Option("--item", "item_id", "ID", "a stored listing (default: the first)", type=str),
            Option("--json", "json_path", "FILE", "a new one, as a line of an item file"),
            Option("--top", "top", "N", "how many to show", 10, Whole(1, 1000)),
            opt.DATA.but("of --json: its images/ has the picture"),
            opt.MODEL.but("of --json: that match run was given"),
            opt.MATCHED,
            opt.STORE.but("a Milvus server that match store has filled"),
            opt.COLLECTION,
        ),
        "tongkuan.match.query:match_query",
    ),
    "match check": Verb(
        "whether what match run made is whole, and its recall as it is now",
        f"match check {MATCHED}",
        (opt.MATCHED,),
        "tongkuan.match.check:match_check",
    ),
    "match score": Verb(
        "F1 of a catalogue's groups by labelled pairs",
        f"match score {MATCHED} {ANSWERS}",
        (opt.MATCHED, opt.PAIRS),
        "tongkuan.match.score:match_score",
    ),
    "export": Verb(
        "the item encoder as an ONNX file, compared with torch; see code/examples/serve.py",
        f"export {DEMO_DATA} {DEMO_MODEL} --out runs/mine/model.onnx",
        (
            opt.MODEL,
            opt.DATA.but("listings to compare on (default: made ones)", default=None),
            opt.SPLIT,
            Option("--items", "items", "N", "of the split to compare on", 32, Whole(1, 100_000)),
            opt.OUT.but("the file", default=Path("weights/model.onnx")),
        ),
        "tongkuan.export.export:export",
        outputs=("out",),
    ),
    "match store": Verb(
        "fill a Milvus server with a matched catalogue; the same command goes on",
        f"match store {MATCHED} --store http://localhost:19530",
        (
            opt.MATCHED,
            opt.STORE.but(more={"required": True}),
            opt.COLLECTION,
            switch("--replace", "replace", "whatever catalogue or model the collection is of"),
        ),
        "tongkuan.match.stores.fill:match_store",
        more=STORE,
    ),
}
