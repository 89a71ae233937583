"""`m2r2kit train stream`: train the accelerated stream of a frozen model."""

import argparse
import hashlib
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..bench.tune import tune_stream
from ..common import UserError
from ..model.backbone import Backbone
from ..model.cpu import parallel
from ..model.folder import trained_folder
from ..stream import checkpoints
from ..stream import train as distillation
from ..stream.distil import DistilConfig, TeacherBatch, needs
from ..stream.registry import FORMS
from ..stream.stream import AcceleratedStream, StreamConfig, check, default_form, tau
from ..text.rows import for_training, text
from . import shared, training
from .result import check_result, keep
from .values import count, natural, number


def arguments(parser):
    shared.model(parser)
    shared.trained(parser, "--out", "where to save the stream", "stream")
    parser.add_argument(
        "--form",
        choices=FORMS,
        help="what an accelerated block computes (default: block; attention for a mixture of experts)",
    )
    parser.add_argument("--exit", type=count, metavar="E", help="block after which the stream is read")
    parser.add_argument(
        "--rate",
        type=number(float, 0, above=True),
        metavar="R",
        help="acceleration rate (default: the rate that reaches the final state at the exit)",
    )
    parser.add_argument(
        "--rank",
        type=natural,
        metavar="R",
        help="rank of the changes to the base matrices; 0 for none (default: full rank)",
    )
    parser.add_argument(
        "--deep",
        type=number(float, 0),
        metavar="SHARE",
        help="relative depth (0-1) of the block whose KV cache the stream also reads, verified tokens only; "
        "0 for none (default: 0.25)",
    )
    parser.add_argument(
        "--near",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also attend to the KV of the stream's own blocks, drafts included (default: no)",
    )
    parser.add_argument(
        "--carry",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also start from the previous token's last state, as in EAGLE (default: yes)",
    )
    parser.add_argument(
        "--ffn-width", type=natural, metavar="W", help="width of the stream's own FFN; 0 for none"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train other readouts of the same size for as many steps and compare them; saves none",
    )
    shared.training_rows(parser)
    shared.tuning(parser)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="initialise from this trained stream, of this model or of one with the same shapes",
    )
    shared.processes(parser)
    shared.record(parser)
    shared.explain(parser, forms=FORMS)


def run(args) -> int:
    """Train, evaluate, save, tune and record a stream; or `--compare`."""
    check_result(args, "stream", "alignment")
    if args.processes > 1 and args.compare:
        raise UserError("--compare times each training in one process; leave out --processes.")
    out = Path(args.out) if args.out else trained_folder(args.model, "stream")
    training.check(args, [] if args.compare else [out / "stream.json", out / "unfinished" / "stream.json"])
    if args.processes > 1 and not parallel.started():
        return parallel.launch(args.processes, args.words)
    group = parallel.group()
    if group.rank():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process saves and stops the others
    backbone = for_training(args.model)
    config = settings(args, backbone)
    check(backbone, config)
    distil = training.settings(args)
    seed = args.seed + 1000 * group.rank()  # each process trains on its own rows
    if args.compare:
        train, held_out = text(backbone, args.corpus, args.rows, seed)
        return compare(backbone, config, train, held_out, distil, args)

    mx.random.seed(args.seed)  # all processes start with the same parameters
    stream = AcceleratedStream(backbone, config)
    start = initialise(stream, args.start, config) if args.start else None
    asked = {name: getattr(args, name) for name in ("rows", "batch", "seed", "processes")}
    asked |= {"steps": distil.steps, "start": start}
    unfinished = out / "unfinished"
    done = resume(stream, unfinished, backbone, config, asked)
    if done["steps"]:
        print(f"Resuming after {done['steps']} steps" + (", not from --start." if args.start else "."))
    train, held_out = text(backbone, args.corpus, args.rows // group.size(), seed)
    if not group.rank():
        asked["text"] = hashlib.sha256(train.tobytes()).hexdigest()
        check_same(done.get("asked", {}), asked, unfinished)
    depths, blocks = needs(stream)
    batches = distillation.teacher_batches(backbone, train, depths, blocks, args.batch)
    validation = [] if group.rank() else distillation.teacher_batches(backbone, held_out, depths, blocks)
    step, begun, before = done["steps"], time.perf_counter(), done["train_seconds"]
    resumed = replace(distil, first_step=step, first_seconds=before)
    with training.progress(distil.steps, first=step, silent=group.rank() > 0) as bar:

        def report(now, loss):
            nonlocal step
            step = now + 1
            bar(now, loss)

        try:
            trained = distillation.train_stream(
                backbone, config, batches, validation, resumed, training.limit(args), report, stream
            )
        except KeyboardInterrupt:
            if group.rank():  # by SIGTERM: two processes must not write the same files
                return 1
            took = round(before + time.perf_counter() - begun, 1)
            facts = {"steps": step, "train_seconds": took, "asked": asked}
            checkpoints.save(stream, config, backbone.sha256, unfinished, "stream", **facts)
            print(f"\nInterrupted; saved after {step} steps. The same command resumes from there.")
            return 1
    if group.rank():
        return 0
    print("  ".join(f"{k} {v:.3f}" for k, v in trained.figures.items() if isinstance(v, float)))
    facts = {"steps": step, "train_seconds": round(trained.seconds), "drafts": training.UNTUNED}
    checkpoints.save(stream, config, backbone.sha256, out, "stream", **facts)  # tuning may be interrupted
    delete_unfinished(unfinished)
    figures = trained.figures | facts | {"parameters": trained.parameters}
    if args.tune:
        tuned, estimate = tune_stream(backbone, stream)
        checkpoints.note(out, "stream", **tuned)
        figures |= tuned | {"predicted_speedup": estimate}
    keep(args, "stream", training.described(args, backbone, config, distil), figures)
    print(f"Saved in {out}.")
    return 0


def settings(args, backbone: Backbone) -> StreamConfig:
    """The stream's settings from the arguments, with the defaults of `StreamConfig` and of the model."""
    default = StreamConfig()
    return StreamConfig(
        form=args.form or default_form(backbone),
        exits=(args.exit,) if args.exit else default.exits,
        rate=args.rate,
        rank=default.rank if args.rank is None else args.rank,
        ffn_width=default.ffn_width if args.ffn_width is None else args.ffn_width,
        deep=default.deep if args.deep is None else args.deep,
        near=args.near,
        carry=args.carry,
    )


def resume(
    stream: AcceleratedStream, folder: Path, backbone: Backbone, config: StreamConfig, asked: dict
) -> dict:
    """Load the state of an interrupted run.

    Returns:
        its `steps`, `train_seconds` and `asked` settings; zero steps if there is none.

    Raises:
        UserError: it has other settings than this run.
    """
    if not (folder / "stream.json").exists():
        return {"steps": 0, "train_seconds": 0.0}
    old, facts = checkpoints.read_settings(folder, "stream", StreamConfig)
    if old != config:
        raise UserError(
            f"{folder} holds an unfinished stream with other settings; use them, or delete the folder."
        )
    check_same(facts.get("asked", {}), asked, folder)
    checkpoints.load_weights(stream, facts, backbone.sha256, folder, "stream")
    return {"train_seconds": 0.0} | facts


def check_same(old: dict, new: dict, folder: Path) -> None:
    """Refuse to resume an unfinished training with other settings."""
    for name in new:
        if name in old and old[name] != new[name]:
            what = "other text" if name == "text" else f"{name} {old[name]}, not {new[name]}"
            raise UserError(
                f"The unfinished training in {folder} has {what}; "
                "repeat its command to resume it, or delete that folder to start again."
            )


def initialise(stream: AcceleratedStream, folder: Path, config: StreamConfig) -> str:
    """Initialise a stream from a trained one, of this model or of one with the same shapes.

    A stream without `carry` can initialise one with it, as that part starts at zero.

    Returns:
        the SHA-256 of the weights of the trained stream.
    """
    old, facts = checkpoints.read_settings(folder, "stream", StreamConfig)
    if old not in (config, replace(config, carry=False)):
        raise UserError(f"The stream in {folder} has other settings ({old}); use the same ones.")
    start = stream if old == config else AcceleratedStream(stream._backbone, old)
    try:
        checkpoints.load_weights(start, facts, facts["base_sha256"], folder, "stream")
    except UserError as error:
        raise UserError(
            f"{error} If the file is intact, its model has other shapes than this one."
        ) from error
    stream.update(start.trainable_parameters())
    return facts["weights_sha256"]


def delete_unfinished(folder: Path) -> None:
    """Delete the state of an interrupted run."""
    for name in ("stream.json", "stream.safetensors"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it is missing, or holds a file of the user or of the system (.DS_Store)
        folder.rmdir()


def compare(backbone: Backbone, base: StreamConfig, train, held_out, distil: DistilConfig, args) -> int:
    """Train readouts of equal size for the same number of steps; one record, `alignment`."""
    exit = base.exits[0]
    depths = {backbone.depth, *range(exit + 1)}
    depths |= {tau(l, 0, exit, backbone.depth, r) for l in range(exit + 1) for r in (base.rate, 1.0)}
    _, blocks = needs(AcceleratedStream(backbone, base))
    blocks |= set(range(exit))
    batches: list[TeacherBatch] = distillation.teacher_batches(backbone, train, depths, blocks, args.batch)
    validation = distillation.teacher_batches(backbone, held_out, depths, blocks)
    rows = []
    print(f"{'form':24} {'params':>9} {'seconds':>7} {'agreement':>9} {'nats':>6} {'cos h_N':>7}")
    for name, made in distillation.comparison(backbone, exit, base):
        if isinstance(made, StreamConfig):
            got = distillation.train_stream(backbone, made, batches, validation, distil)
        else:
            got = distillation.train_readout(backbone, made(), batches, validation, distil)
        f = got.figures
        rows.append(
            {"form": name, "exit": exit, "parameters": got.parameters, "train_seconds": got.seconds, **f}
        )
        print(
            f"{name:24} {got.parameters:9,} {got.seconds:7.0f} {f['agreement']:9.3f} "
            f"{f['cross_entropy']:6.3f} {f['cosine_final']:7.3f}",
            flush=True,
        )
    keep(args, "alignment", training.described(args, backbone, base, distil), {"rows": rows})
    return 0
