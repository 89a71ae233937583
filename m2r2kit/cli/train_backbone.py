"""`m2r2kit train backbone`: train a pocket model from scratch."""

import hashlib
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

from mlx.utils import tree_flatten
from tqdm import tqdm

from ..bench.tables import Table
from ..common import UserError, check_writable, parse_json
from ..model.cpu import parallel
from ..pocket import export as pocket
from ..pocket.pretrain import PretrainConfig, Run, settings
from ..pocket.tokenizer import Batches, prepare
from ..text import download
from ..text.corpus import KINDS, documents
from . import shared
from .result import check_result, keep
from .values import count


def arguments(parser):
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run; an existing run resumes"
    )
    shared.corpus(parser)
    parser.add_argument(
        "--type", choices=("llama", "olmoe"), help="dense model or mixture of experts (default: llama)"
    )
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="for olmoe: dense model to start from and to distil"
    )
    parser.add_argument("--tokens", type=count, metavar="N", help="total number of training tokens")
    shared.minutes(parser)
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="export to this Hugging Face folder, even before all tokens are trained (default: 'model' in "
        "the run's folder, at the end)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON of run settings: fields of PretrainConfig, or of OlmoeConfig for olmoe",
    )
    shared.processes(parser)
    shared.record(parser)


def run(args) -> int:
    """Train a pocket model or resume; at the end, or with `--to`, export, evaluate and record it.

    Args:
        args: out, corpus, type, start, tokens, minutes, to, config, processes: as in
            `m2r2kit train backbone --help`.

    Returns:
        0, or 1 if it was interrupted (the run is saved).
    """
    check_result(args, "pretrain")
    if args.processes > 1 and not parallel.started():
        return parallel.launch(args.processes, args.words)
    folder = Path(args.out)
    check_writable(folder / "run.json")
    if args.to:
        check_writable(Path(args.to) / "config.json")
    command = _command(args)
    run = Run(folder, _settings(args))
    if args.tokens:
        run.config = replace(run.config, tokens=args.tokens)
    first = run.group.rank() == 0
    if not first:
        parallel.any_of(False)  # wait for the first process to write the tokens, then read them
    start = getattr(run.config, "start", "")
    tokenizer, tokens = prepare(
        folder,
        lambda: documents(_corpus(args.corpus)),
        run.config.vocabulary,
        Path(start) / "tokenizer.json" if start else None,  # the tokenizer of the model to start from
    )
    if first:
        parallel.any_of(False)
    run.batches = Batches(tokens)
    _train(run, 60 * args.minutes if args.minutes else math.inf)
    if not first:
        return 0  # the first process reports
    if run.stopped or (run.seen < run.config.tokens and not args.to):
        print(f"Saved after {run.seen:,} of {run.config.tokens:,} tokens; resume with: {command}")
        return 1 if run.stopped else 0
    target = pocket.export(run, tokenizer, Path(args.to) if args.to else folder / "model")
    print(f"{target}: {run.blocks} blocks, {run.seen:,} tokens seen. Held-out documents:")
    figures = pocket.evaluate(target, documents(_corpus(args.corpus)), window=run.config.window)
    rows = [
        (kind, f"{f['loss']:.3f}", f"{f['bits_per_byte']:.3f}", f"{f['accuracy']:.1%}")
        for kind in KINDS
        if (f := figures.get(kind))
    ]
    print(Table(("", "nats", "bits/byte", "next token right"), rows))
    if "experts" in figures:
        share = figures["experts"]["share"]
        least, most = (run.config.experts * f(map(f, share)) for f in (min, max))
        print(
            f"Least used expert: {least:.2f} times an even share of the tokens; most used: {most:.2f} times"
        )
    keep(args, "pretrain", _facts(run, target), figures)
    return 0


def _settings(args) -> PretrainConfig | None:
    """The run settings from `--config`, `--type` and `--start`; None if none is given."""
    asked = {"type": args.type, "start": args.start and str(args.start)}
    asked = {name: value for name, value in asked.items() if value}
    try:
        if args.config:
            asked = parse_json(Path(args.config).read_text()) | asked
        if asked.get("type") != "olmoe" and "start" in asked:
            raise UserError("--start needs a mixture of experts; add --type olmoe")
        return settings(asked) if asked else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{args.config} is not a JSON object of run settings ({error})") from None


def _corpus(folder: Path | None) -> Path:
    return Path(folder) if folder else download.corpus_folder()


def _train(run: Run, seconds: float) -> None:
    total = run.config.tokens
    silent = run.group.rank() > 0
    with tqdm(
        total=total, initial=min(run.seen, total), unit=" tokens", unit_scale=True, disable=silent
    ) as bar:

        def report(run, loss, rate):
            bar.set_postfix(loss=f"{loss:.3f}", blocks=run.blocks, refresh=False)
            bar.update(min(run.seen, total) - bar.n)

        run.train(seconds, report)


def _facts(run: Run, folder: Path) -> dict:
    """The facts of a training run, for its record."""
    weights = (folder / "model.safetensors").read_bytes()
    return {
        "model": folder.name,
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(w.size for _, w in tree_flatten(run.parameters)),
        "blocks_now": run.blocks,
        "tokens_seen": run.seen,
        "training_seconds": round(run.seconds),
        "kinds": list(KINDS),
        **asdict(run.config),
    }


def _command(args) -> str:
    words = ["m2r2kit", "train", "backbone"]
    for name in ("out", "corpus", "type", "start", "tokens", "minutes", "to", "config", "processes"):
        if getattr(args, name, None) not in (None, 1):
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join(words)
