"""`m2r2kit train stream`: the accelerated stream of a model, which itself stays as it is."""

import hashlib
import json
import math
import os
import shlex
import signal
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from .. import checkpoints, distillation, download, parallel, records
from ..backbone import Backbone
from ..corpus import KINDS, documents
from ..errors import UserError
from ..paths import cache_dir
from ..residuals import AcceleratedStream, StreamConfig, check, tau
from ..training import DistilConfig, Lesson, needs
from ..tuning import tune_stream

HELD_OUT_ROWS = 96
OWN = 0.9  # share of the rows that the model writes itself
WRITTEN = 1  # changes with the way the rows are made, so that older ones are not taken for them
UNTUNED = 4  # drafts in a step where --no-tune leaves it to `m2r2kit tune`
SMALL = 1 << 28  # numbers of a model that is trained for in float32 on any device


def run(args) -> int:
    """Train, measure, tune the number of drafts, save and record; or `--compare`."""
    if args.processes > 1 and args.compare:
        raise UserError("--compare times each training, so it runs in one process; leave --processes out.")
    if args.processes > 1 and not parallel.started():
        return parallel.launch(args.processes, args.words)
    group = parallel.group()
    if group.rank():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process saves, and ends the others
    backbone = for_training(args.model)
    config = settings(args)
    check(backbone, config)
    out = Path(args.out) if args.out else Path(args.model) / "stream"
    distil = DistilConfig(steps=args.steps or DistilConfig.steps, seed=args.seed)
    seed = args.seed + 1000 * group.rank()  # each process reads rows of its own
    if args.rows < args.batch:
        raise UserError(f"{args.rows} rows of text are no lesson; ask for at least {args.batch}.")
    if args.compare:
        train, held_out = text(backbone, args.corpus, args.rows, seed)
        return compare(backbone, config, train, held_out, distil, args)

    mx.random.seed(args.seed)  # all processes begin with the same numbers
    stream = AcceleratedStream(backbone, config)
    if args.start:
        begin_with(stream, args.start, config)
    unfinished = out / "unfinished"
    done = resume(stream, unfinished, backbone, config)
    if done:
        print(f"Going on after {done} steps" + (", not from --start." if args.start else "."))
    train, held_out = text(backbone, args.corpus, args.rows // group.size(), seed)
    depths, blocks = needs(stream)
    lessons = distillation.lessons(backbone, train, depths, blocks, args.batch)
    judges = [] if group.rank() else distillation.lessons(backbone, held_out, depths, blocks)
    seconds = 60 * args.minutes if args.minutes else math.inf
    step = done
    with tqdm(total=distil.steps, initial=done, unit="step", disable=group.rank() > 0) as bar:

        def report(now, loss):
            nonlocal step
            step = now + 1
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(step - bar.n)

        try:
            trained = distillation.train_stream(
                backbone, config, lessons, judges, replace(distil, first_step=done), seconds, report, stream
            )
        except KeyboardInterrupt:
            checkpoints.save(stream, config, backbone.sha256, unfinished, "stream", steps=step)
            print(f"\nInterrupted; saved after {step} steps. The same command goes on from there.")
            return 1
    if group.rank():
        return 0
    print("  ".join(f"{k} {v:.3f}" for k, v in trained.figures.items() if isinstance(v, float)))
    tuned, estimate = tune_stream(backbone, stream) if args.tune else ({"drafts": UNTUNED}, None)
    facts = {"steps": step, "train_seconds": round(trained.seconds)} | tuned
    checkpoints.save(stream, config, backbone.sha256, out, "stream", **facts)
    forget(unfinished)
    figures = trained.figures | facts | {"parameters": trained.parameters}
    figures |= {"predicted_speedup": estimate} if args.tune else {}
    records.append(
        "stream", command=command(), settings=described(backbone, config, distil, args), figures=figures
    )
    print(f"Saved in {out}.")
    return 0


def for_training(model) -> Backbone:
    """The frozen model: a small one in float32, which half precision of states and logits would blur."""
    backbone = Backbone.load(model)
    if sum(w.size for _, w in tree_flatten(backbone.model.parameters())) <= SMALL:
        backbone.model.set_dtype(mx.float32)
    return backbone


def settings(args) -> StreamConfig:
    """The stream that the arguments ask for; what they leave out is `StreamConfig`'s default."""
    default = StreamConfig()
    return StreamConfig(
        form=args.form,
        exits=(args.exit,) if args.exit else default.exits,
        rate=args.rate,
        rank=default.rank if args.rank is None else args.rank,
        ffn_width=default.ffn_width if args.ffn_width is None else args.ffn_width,
        deep=default.deep if args.deep is None else args.deep,
        near=args.near,
        carry=args.carry,
    )


def text(backbone: Backbone, corpus, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, and rows to judge by from documents that no training has seen.

    The model writes most of them, which takes minutes: they are kept in the cache folder for the next
    training that asks for the same.
    """
    all_documents = documents(Path(corpus) if corpus else download.corpus_folder())
    asked = [WRITTEN, backbone.sha256, rows, seed, OWN, distillation.WINDOW, HELD_OUT_ROWS]
    key = hashlib.sha256(json.dumps(asked).encode())
    for d in all_documents:
        key.update(f"{d.name}\0{d.text}\0".encode())
    file = cache_dir() / f"text-{key.hexdigest()[:16]}.npz"
    try:
        with np.load(file) as kept:
            return kept["train"], kept["held_out"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # none, or not whole
    train, held_out = write(backbone, all_documents, rows, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(temporary, train=train, held_out=held_out)
    temporary.replace(file)
    return train, held_out


def write(backbone: Backbone, all_documents: list, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What `text` keeps."""
    train, held_out = (tokens_of(backbone, all_documents, held, rows, seed) for held in (False, True))
    train = distillation.windows(backbone, train, rows, OWN, seed)
    return train, distillation.windows(backbone, held_out, HELD_OUT_ROWS, OWN, seed + 1)


def tokens_of(
    backbone: Backbone, all_documents: list, held_out: bool, rows: int, seed: int
) -> dict[str, np.ndarray]:
    """Token ids of each kind's documents in one row, as many as `rows` rows are to be drawn from."""
    ids: dict[str, list[int]] = {kind: [] for kind in KINDS}
    budget = 40 * rows * distillation.WINDOW  # characters of a kind
    for d in np.random.default_rng(seed).permutation(np.array(all_documents, dtype=object)):
        if d.held_out == held_out and len(ids[d.kind]) * 3 < budget:
            ids[d.kind] += [
                *backbone.tokenizer.encode(d.text, add_special_tokens=False, verbose=False),
                *sorted(backbone.eos)[:1],
            ]
    return {kind: np.array(i, dtype=np.int32) for kind, i in ids.items()}


def resume(stream: AcceleratedStream, folder: Path, backbone: Backbone, config: StreamConfig) -> int:
    """Load what an interrupted run left; returns its steps, 0 if there is none."""
    if not (folder / "stream.json").exists():
        return 0
    old, facts = checkpoints.read_settings(folder, "stream", StreamConfig)
    if old != config:
        raise UserError(
            f"{folder} holds an unfinished stream with other settings; delete it or use its settings."
        )
    checkpoints.load_weights(stream, facts, backbone.sha256, folder, "stream")
    return facts["steps"]


def begin_with(stream: AcceleratedStream, folder: Path, config: StreamConfig) -> None:
    """Start from another trained stream: of this model, or of one with the same shapes. One that
    carries nothing from token to token may go on as one that does, as that begins with zeros."""
    old, facts = checkpoints.read_settings(folder, "stream", StreamConfig)
    if old not in (config, replace(config, carry=False)):
        raise UserError(f"The stream in {folder} has other settings ({old}); ask for the same ones.")
    start = stream if old == config else AcceleratedStream(stream._backbone, old)
    try:
        checkpoints.load_weights(start, facts, facts["base_sha256"], folder, "stream")
    except UserError as error:
        raise UserError(f"{error} If it is whole, its model has other shapes than this one.") from error
    stream.update(start.trainable_parameters())


def forget(folder: Path) -> None:
    """Delete what an interrupted run left."""
    for name in ("stream.json", "stream.safetensors"):
        (folder / name).unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()


def compare(backbone: Backbone, base: StreamConfig, train, held_out, distil: DistilConfig, args) -> int:
    """Every readout of the same size, trained the same number of steps; one record, `alignment`."""
    exit = base.exits[0]
    depths = {backbone.depth, *range(exit + 1)}
    depths |= {tau(l, 0, exit, backbone.depth, r) for l in range(exit + 1) for r in (base.rate, 1.0)}
    _, blocks = needs(AcceleratedStream(backbone, base))
    blocks |= set(range(exit))
    lessons: list[Lesson] = distillation.lessons(backbone, train, depths, blocks, args.batch)
    judges = distillation.lessons(backbone, held_out, depths, blocks)
    rows = []
    print(f"{'form':24} {'numbers':>9} {'seconds':>7} {'agreement':>9} {'nats':>6} {'cos h_N':>7}")
    for name, made in distillation.comparison(backbone, exit, base):
        if isinstance(made, StreamConfig):
            got = distillation.train_stream(backbone, made, lessons, judges, distil)
        else:
            got = distillation.train_readout(backbone, made(), lessons, judges, distil)
        f = got.figures
        rows.append(
            {"form": name, "exit": exit, "parameters": got.parameters, "train_seconds": got.seconds, **f}
        )
        print(
            f"{name:24} {got.parameters:9,} {got.seconds:7.0f} {f['agreement']:9.3f} "
            f"{f['cross_entropy']:6.3f} {f['cosine_final']:7.3f}",
            flush=True,
        )
    records.append(
        "alignment",
        command=command(),
        settings=described(backbone, base, distil, args),
        figures={"rows": rows},
    )
    return 0


def described(backbone: Backbone, config: StreamConfig, distil: DistilConfig, args) -> dict:
    """What a record says of how a stream was trained."""
    model = str(args.model).rstrip("/").rsplit("/", 1)[-1]
    return {
        "model": model,
        "model_sha256": backbone.sha256,
        "rows": args.rows,
        "batch": args.batch,
        **asdict(config),
        **asdict(distil),
    }


def command() -> str:
    """The command that is running, as a person would type it."""
    return shlex.join(["m2r2kit", *sys.argv[1:]])
