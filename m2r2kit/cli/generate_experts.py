"""`m2r2kit generate --experts STORE`: the same answers with experts that come from disk."""

import json
import sys
from dataclasses import asdict

import numpy as np

from ..common import UserError, check_writable, peak_bytes
from ..driver import Generation
from ..experts import registry as methods
from ..experts import trained
from ..experts.decode import ExpertDecoder, StreamedModel
from ..experts.predictors import Predictor
from ..experts.reader import Reader
from ..experts.registry import TRAINED
from ..experts.slots import budget_of_share, slots_of_budget
from ..experts.trace import Trace
from ..speculation import Sampler
from .generate import Stream


def run(args, prompts) -> int:
    """Answer the prompts; `--json` prints one object each."""
    if args.method not in (None, "plain"):
        raise UserError(f"--experts decodes plainly, without --method {args.method}; leave one of them out.")
    if args.trace:
        check_writable(args.trace)
    model = StreamedModel(args.model, args.experts)
    backbone, manifest = model.backbone, model.store.manifest
    ids = [backbone.encode(p.prompt, chat=not args.raw) for p in prompts]  # all are checked first
    known = Trace.load(args.known, manifest) if args.known else None
    make = methods.policy(args.policy, known)
    who = predictor(args, model, known)
    trace = Trace(manifest.blocks, manifest.experts, manifest.top_k) if args.trace else None
    with Reader(model.store, args.reads, args.threads, args.link) as reader:
        budget = args.budget
        if isinstance(budget, float):
            budget = budget_of_share(manifest, budget, reader.buffer_bytes)
        slots = slots_of_budget(manifest, budget, reader.buffer_bytes)
        decoder = ExpertDecoder(model, model.residency(slots, make), reader, who, trace)
        for prompt, tokens in zip(prompts, ids, strict=True):
            show = None if args.json else Stream(backbone)
            out = decoder.generate(tokens, args.max_tokens, chooser(args), show)
            if args.json:
                print(json.dumps(as_json(backbone, prompt.id, out, manifest.mean_record_bytes)))
            else:
                show.close()
                print(in_words(out, manifest.mean_record_bytes), file=sys.stderr)
            sys.stdout.flush()
    if trace:
        trace.save(args.trace)
    return 0


def predictor(args, model: StreamedModel, known: Trace | None) -> Predictor:
    """The predictor that the arguments ask for, loaded if it was trained."""
    name, made = args.predictor, None
    if name in TRAINED:
        folder = args.stream if name == "m2r2" else None
        made = trained.predictor(model.backbone, args.model, name, args.width, folder)
    return methods.predictor(name, model, args.distance, args.width, known, made)


def chooser(args):
    """How a token is taken from logits (V,); None is the likeliest."""
    if args.temp == 0:
        return None
    sampler = Sampler(args.temp, args.top_k, args.top_p, args.seed)
    return lambda logits: sampler.draw(np.asarray(sampler.probabilities(logits[None]))[0])


def as_json(backbone, id: str, out: Generation, record_bytes: int) -> dict:
    """The object that `--json` prints for a prompt."""
    return {
        "id": id,
        "tokens": out.tokens,
        "text": backbone.decode(out.tokens),
        "seconds": round(out.seconds, 6),
        "prefill_seconds": round(out.prefill_seconds, 6),
        "stall_seconds": round(out.experts.stall_seconds, 6),
        "stopped": out.stopped,
        **asdict(out.experts.counts),
        "in_time": out.experts.in_time,
        "late": out.experts.late,
        "bytes_asked_for": out.experts.counts.reads * record_bytes,
        "peak_bytes": peak_bytes(),
    }


def in_words(out: Generation, record_bytes: int) -> str:
    """One line of what it took."""
    counts = out.experts.counts
    resident, in_time, late, missed = (
        f"{100 * n / max(1, counts.accesses):.0f} %"
        for n in (counts.resident, out.experts.in_time, out.experts.late, counts.missed)
    )
    seconds = out.seconds - out.prefill_seconds
    return (
        f"{len(out.tokens)} tokens, {len(out.tokens) / seconds:.0f} tokens/s; experts: {resident} resident, "
        f"{in_time} read in time, {late} late, {missed} missed; "
        f"{counts.reads * record_bytes / max(1, len(out.tokens)) / 1e6:.2f} MB asked for a token"
    )
