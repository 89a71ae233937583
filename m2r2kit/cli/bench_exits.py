"""`m2r2kit bench exits`: quality against depth for each method, then the time of some thresholds."""

import sys

from tqdm import tqdm

from ..bench import exits as bench
from ..bench import measured
from ..bench.merit import LOSSES
from ..bench.questions import questions
from ..common import UserError
from ..exits import trained
from ..exits.methods import Method, method
from ..exits.registry import METHODS
from ..exits.teacher_forced import texts_of
from ..model.backbone import Backbone
from ..speculation import generate
from ..text import prompts as prompt_files
from . import shared
from .result import check_result, keep, model_name
from .values import natural, some_of


def arguments(parser):
    shared.model(parser)
    shared.exits(parser)
    parser.add_argument(
        "--methods",
        type=some_of(METHODS),
        default=["m2r2", "m2r2-oracle", "calm"],
        metavar="A,B,..",
        help=f"methods to compare, among {', '.join(METHODS)}, or all (default: m2r2,m2r2-oracle,calm)",
    )
    shared.prompts(parser)
    shared.max_tokens(parser, 64)
    parser.add_argument(
        "--timed",
        type=natural,
        default=8,
        metavar="N",
        help="prompts of each kind to time; 0 times none (default: 8)",
    )
    shared.repeats(parser, 3)
    shared.result(parser)
    shared.explain(parser, methods=METHODS)


def run(args) -> int:
    """Measure, print a table, and with `--record` add a record."""
    check_result(args, "exits")
    backbone = Backbone.load(args.model)
    folder = trained.folder(args.model, args.trained)
    methods = {name: method(name, backbone, folder) for name in args.methods}
    if "m2r2" not in methods:
        raise UserError("All methods are compared with m2r2; add it to --methods.")
    prompts = prompt_files.first_of_each_kind(prompt_files.read(args.prompts or prompt_files.ALL), args.limit)
    asked = questions(backbone, prompts, args.max_tokens)
    if asked.left_out:
        print(asked.left_out)
    texts = texts_of(backbone, asked.ids, args.max_tokens)
    curves = {}
    passes = sum(len(m.thresholds) for m in methods.values()) * -(-len(asked.ids) // bench.TOGETHER)
    with tqdm(total=passes, unit="pass", disable=quiet()) as bar:
        for name, each in methods.items():
            bar.set_description(name)
            curves[name] = bench.measure(each, texts, bar.update)
    figures = {"methods": bench.figures(curves, methods, bench.nats_of(backbone, texts))}
    five = {name: m["merit"][str(LOSSES[-1])]["saved"] for name, m in figures["methods"].items()}
    if five.get("m2r2-oracle"):
        figures["oracle_share"] = five["m2r2"] / five["m2r2-oracle"]
    figures["exits"] = {
        kind: bench.at_exits(reader, backbone, texts) for kind, reader in readers(methods).items()
    }
    if args.timed:
        few = prompt_files.first_of_each_kind(asked.prompts, args.timed)
        answers = [
            texts.tokens[i, f + 1 : e + 1].tolist() for i, (f, e) in enumerate(zip(texts.first, texts.end))
        ]
        pairs = dict(zip(asked.prompts, zip(asked.ids, answers, strict=True), strict=True))
        time(backbone, methods, curves, [pairs[p] for p in few], figures["methods"], args.repeats)
        arithmetic = [pair for p, pair in pairs.items() if p.kind == "arithmetic"]
        keep_answers(backbone, methods, arithmetic, figures["methods"], args.max_tokens)
    print(*measured.exits(figures))
    settings = {
        "model": model_name(args.model),
        "model_sha256": backbone.sha256,
        "depth": backbone.depth,
        "exits": list(methods["m2r2"].reader.exits),
        "starts": list(methods["m2r2"].reader.starts),
        "prompts": len(asked.prompts),
        "tokens": int(texts.gated.sum()),
        "max_tokens": args.max_tokens,
        "parameters": {name: trained.parameter_counts(each.module) for name, each in methods.items()},
        "timed": args.timed,
        "repeats": args.repeats,
    }
    keep(args, "exits", settings, figures, asked.prompts)
    return 0


def readers(methods: dict[str, Method]) -> dict:
    """What each kind of module reads at the exits."""
    return {METHODS[name].kind: each.reader for name, each in methods.items() if each.reader is not None}


def quiet() -> bool:
    return not sys.stderr.isatty()


def time(backbone: Backbone, methods: dict, curves: dict, pairs, figures: dict, repeats: int) -> None:
    """Add `timed` and `fastest` to the figures of each method that can decode.

    Args:
        pairs: (prompt ids, answer ids) of each text.
    """
    arms = []
    for name, each in methods.items():
        if name in bench.UNTIMED:
            continue
        arms += [bench.timed(each, t) for t in bench.points_to_time(curves[name])]

    def plain(prompt, tokens):
        return generate(backbone, prompt, max_tokens=tokens).seconds

    with tqdm(
        total=(repeats + 1) * (len(arms) + 1) * len(pairs), unit="text", desc="time", disable=quiet()
    ) as bar:
        seconds = bench.time_points(arms, plain, pairs, repeats, bar.update)
    for arm in arms:
        figures[arm.name].setdefault("timed", []).append(arm.figures(seconds))
    for name in figures:
        best = bench.fastest(figures[name].get("timed", []), LOSSES[-1])
        figures[name]["fastest"] = best


def keep_answers(backbone: Backbone, methods: dict, pairs, figures: dict, max_tokens: int) -> None:
    """Add to the figures how many arithmetic answers each method keeps at its fastest threshold."""
    for name, each in methods.items():
        if best := figures[name].get("fastest"):
            arm = bench.timed(each, best["threshold"])
            figures[name]["answers"] = bench.answers_kept(backbone, arm, pairs, max_tokens)
