"""The verbs: one table of what each takes and the function it calls. `./entrypoint.sh VERB [--option value]`

No torch here: what a function needs is imported when it is called.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tongkuan.base.errors import UserError, clip, nearest
from tongkuan.base.files import check_apart_from_data
from tongkuan.base.machine import available_cores
from tongkuan.base.numbers import Real, Whole
from tongkuan.cli import options as opt
from tongkuan.cli.catalogue import CATALOGUE_VERBS
from tongkuan.cli.options import Option, Parser, switch
from tongkuan.cli.verb import ANSWERS, DEMO_DATA, DEMO_MODEL, SUBMITTED, Target, Verb
from tongkuan.ranks.place import forget, is_own_rank, nodes_of, num_ranks

MANY = 14  # options: naming them all above their list would take a third of a screen
LINKS = """\
Cut short, the same command goes on.

The organiser's links are signed and expire, so they are yours to bring: a line of FILE is
a file, `#` begins a comment, and without NAME the last part of the URL's path counts.

  NAME URL [size=BYTES] [sha256=HEX]

Names: item_{train,valid,test}_info.jsonl, item_{...}_pair.jsonl, item_{...}_images.zip or
its parts .zip.partaa, .zip.partab and so on, which are joined into the .zip.

"""

VERBS = {
    "download": Verb(
        "fetch the organiser's files, or take them from a folder",
        "download --from runs/demo/raw --raw runs/mine/raw",
        (opt.RAW,),
        "data_scripts.download:download_from",
        one_of=(
            Option("--urls", "urls", "FILE", "a list of links, see below"),
            Option("--from", "folder", "DIR", "a folder to copy from"),
        ),
        more=LINKS,
    ),
    "sample": Verb(
        "make the sample catalogue, in the organiser's raw format",
        "sample --raw runs/sample/raw --products 60",
        (
            opt.RAW,
            opt.PRODUCTS,
            Option("--seed", "seed", "N", "same seed, same bytes", 0, Whole(0, 2**63 - 1)),
        ),
        "data_scripts.sample:sample",
    ),
    "resize": Verb(
        "raw files -> checked items and 384 x 384 pictures",
        "resize --raw runs/demo/raw --data runs/mine/data --size 96",
        (
            opt.RAW.but("the organiser's files"),
            opt.DATA.but("to fill"),
            Option("--size", "size", "N", "pixels a side", 384, Whole(1, 4096)),
            Option("--workers", "workers", "N", "processes (default: one a core)", type=Whole(1, 4096)),
        ),
        "data_scripts.resize:resize",
        derived={"workers": lambda workers: workers or available_cores()},
    ),
    "split": Verb(
        "item-disjoint train and validation pairs",
        "split --data runs/demo/data",
        (
            opt.DATA.but("what resize made"),
            Option("--ratio", "ratio", "R", "train to valid pairs", 5.6, Real(above=0)),
            Option("--seed", "seed", "N", "among components of a size", 0, Whole(-(2**63), 2**63 - 1)),
        ),
        "data_scripts.split:split",
    ),
    "attributes": Verb(
        "which attribute keys items have, and how well they tell products apart",
        "attributes --data runs/demo/data --top 5",
        (
            opt.DATA.but("what resize made"),
            Option("--raw", "raw_dir", "DIR", "the organiser's files instead"),
            Option("--split", "splits", "S", "may be repeated (default: all)", type=str, more={"action": "append"}),
            Option("--top", "top", "N", "keys to show", 20, Whole(1, 4096)),
            opt.STYLE,
        ),
        "data_scripts.attributes:attributes",
        derived={"folder": lambda data_dir, raw_dir: raw_dir or data_dir},
    ),
    "settings": Verb(
        "all settings of a preset, and where each value comes from",
        "settings --preset demo train.steps=500",
        (opt.PRESET, opt.OVERRIDES),
        "tongkuan.presets:show",
    ),
    "weights": Verb(
        "import a released checkpoint, or fetch a preset's encoders ahead",
        "weights --preset small",
        (
            Option("--model", "checkpoint", "FILE", "a released .pth, whole or in parts, to import"),
            opt.PRESET.but("its recipe, or whose encoders to fetch"),
            Option("--text-encoder", "text_encoder", "DIR", "config.json and vocab.txt of its texts"),
            opt.THRESHOLD.but("of the imported model", default=0.0),
            opt.OUT.but("the imported model", default=opt.MODEL.default),
            opt.OVERRIDES.but("such as model.image.size=224"),
        ),
        "tongkuan.model.released:fetch_encoders",
        instead={"checkpoint": "tongkuan.model.released:import_release"},
    ),
    "train": Verb(
        "train a model; the same command resumes",
        f"train --preset demo {DEMO_DATA} --run runs/mine --model runs/mine/model.safetensors train.steps=100",
        (
            opt.PRESET,
            opt.DATA.but("what split made"),
            opt.RUN,
            opt.MODEL.but("the best one"),
            opt.NPROC,
            opt.NNODES,
            opt.NODE_RANK,
            opt.MASTER,
            opt.DRY_RUN,
            opt.OVERRIDES,
        ),
        "tongkuan.learn.train:train",
        instead={"dry_run": "tongkuan.dryrun:dry_run_training"},
        derived={
            "settings": "tongkuan.presets:load_settings",
            "run_dir": lambda run_dir, preset: run_dir or Path("runs") / Path(preset).stem,
        },
        outputs=("run_dir", "model_path"),
        has_ranks=True,
    ),
    "evaluate": Verb(
        "precision, recall and F1 of a model on labelled pairs",
        f"evaluate {DEMO_DATA} {DEMO_MODEL}",
        (opt.DATA, opt.SPLIT.but(default="valid"), *opt.ENCODING, opt.BLEND),
        "tongkuan.result.evaluate:evaluate",
        outputs=("cache_dir",),
        has_ranks=True,
    ),
    "predict": Verb(
        "write submit/result.jsonl",
        f"predict {DEMO_DATA} {DEMO_MODEL} --submit runs/mine/submit",
        (opt.DATA, opt.SPLIT, *opt.ENCODING, opt.BLEND, opt.SUBMIT, opt.DRY_RUN),
        "tongkuan.result.predict:predict",
        instead={"dry_run": "tongkuan.dryrun:dry_run_prediction"},
        outputs=("submit_dir", "cache_dir"),
        has_ranks=True,
    ),
    "verify": Verb(
        "predict again from manifest.json and compare to the byte",
        f"verify {DEMO_DATA} {DEMO_MODEL} {SUBMITTED}",
        (opt.SUBMIT, opt.DATA, opt.MODEL, opt.NPROC),
        "tongkuan.result.verify:verify",
        has_ranks=True,
    ),
    "check": Verb(
        "hold a result against the judges' contract",
        f"check {SUBMITTED} --pairs runs/demo/data/item_test_pair.jsonl",
        (opt.SUBMIT, opt.PAIRS),
        "tongkuan.judge.check:check",
    ),
    "score": Verb(
        "the judges' F1 of a result",
        f"score {SUBMITTED} {ANSWERS}",
        (opt.SUBMIT, opt.PAIRS),
        "tongkuan.judge.check:score",
    ),
    "plot": Verb(
        "plot the scores of same and different pairs of a result",
        f"plot {SUBMITTED} {ANSWERS}",
        (opt.SUBMIT, opt.PAIRS, opt.OUT.but(".svg or .png (default SUBMIT/scores.svg)")),
        "tongkuan.report.plot:plot",
        derived={"out": lambda out, submit_dir: out or submit_dir / "scores.svg"},
    ),
    "report": Verb(
        "one page of a result: figures, curves, a slider, pairs with pictures",
        f"report {SUBMITTED} {ANSWERS} {DEMO_DATA} --run runs/demo/train",
        (
            opt.SUBMIT,
            opt.PAIRS,
            opt.DATA,
            opt.RUN.but("a training run: adds its curves"),
            Option("--against", "against_dir", "DIR", "another result of these pairs to compare with"),
            opt.OUT.but(".html (default SUBMIT/report.html)"),
        ),
        "tongkuan.report.report:report",
        derived={"out": lambda out, submit_dir: out or submit_dir / "report.html"},
        outputs=("out",),
    ),
    "explain": Verb(
        "one page of a pair: what its verdict rests on, by taking parts away",
        f"explain {DEMO_DATA} {DEMO_MODEL} --out runs/mine/explain.html",
        (
            opt.PAIR,
            opt.DATA,
            opt.SPLIT,
            opt.MODEL,
            opt.THRESHOLD,
            opt.PRECISION,
            opt.GRID,
            opt.NPROC,
            opt.OUT.but(default=Path("submit/explain.html")),
        ),
        "tongkuan.report.explain:explain",
        outputs=("out",),
        has_ranks=True,
    ),
    **CATALOGUE_VERBS,
    "demo": Verb(
        "the whole job on a sample catalogue, in minutes",
        "demo --run runs/quick --products 60 train.steps=50",
        (
            opt.RUN.but("its folder", default=Path("runs/demo")),
            opt.PRODUCTS.but("of the catalogue (default: sample's)", default=None),
            switch("--ablation", "with_ablation", "also train on text alone and on pictures alone"),
            opt.NPROC,
            opt.OVERRIDES,
        ),
        "tongkuan.demo:demo",
        derived={"run_verb": lambda: main},
    ),
}


def usage() -> str:
    """What there is, a line a verb."""
    verbs = {name: verb.about for name, verb in VERBS.items()} | {"test": "the test suite"}
    lines = "\n".join(f"  {name:<13}{about}" for name, about in verbs.items())
    return (
        "Tongkuan: do two shop listings sell the same product?\n\n"
        "./entrypoint.sh VERB [--option value] [section.key=value]\n\n"
        f"{lines}\n\nStart with ./entrypoint.sh demo; each verb answers --help."
    )


def parser_of(name: str) -> Parser:
    """The options of a verb. UserError when there is no such verb."""
    if name not in VERBS:
        hint = nearest(name, [*VERBS, "test"])
        raise UserError(f"no verb {clip(name)}{hint}; run ./entrypoint.sh to see what there is")
    verb = VERBS[name]
    parser = Parser(name, verb.about, f"./entrypoint.sh {verb.example}", verb.more)
    for option in verb.options:
        option.add_to(parser)
    if len(verb.options) > MANY:
        parser.usage = "%(prog)s [--option value]"
    if verb.one_of:
        group = parser.add_mutually_exclusive_group(required=True)
        for option in verb.one_of:
            option.add_to(group)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one verb; exit code 0, or an exception."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    name = " ".join(argv[:words])
    given = vars(parser_of(name).parse_intermixed_args(argv[words:]))
    verb = VERBS[name]
    if written := {name: given[name] for name in verb.outputs if given[name] is not None}:
        folders = [path for name, path in written.items() if name.endswith("_dir")]
        files = [path for name, path in written.items() if not name.endswith("_dir")]
        if given["data_dir"] is not None:
            check_apart_from_data(given["data_dir"], folders, files)
    if not verb.has_ranks or given.get("ray_address"):
        forget()
    elif (code := ranks_elsewhere(given, argv)) is not None:
        return code
    given |= {name: call(target, given) for name, target in verb.derived.items()}
    text = call(next((other for name, other in verb.instead.items() if given[name]), verb.function), given)
    if isinstance(text, str):
        print(text)
    return 0


def ranks_elsewhere(given: Mapping[str, Any], argv: Sequence[str]) -> int | None:
    """The exit code of ranks that do the work as processes of their own; None when it is to be done in this one."""
    nodes = nodes_of(*(given.get(name) for name in ("nnodes", "node_rank", "master")))
    count = num_ranks(given["nproc"], nodes)
    if is_own_rank() or max(1, count) * (nodes.count if nodes else 1) == 1:
        return None
    from tongkuan.ranks.launch import launch

    return launch(max(1, count), argv, nodes)


def call(target: Target, given: Mapping[str, Any]) -> Any:
    """What a function returns for the arguments that it has parameters for."""
    function: Any = target
    if isinstance(target, str):
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
    return function(**{name: given[name] for name in inspect.signature(function).parameters if name in given})
