"""`m2r2kit generate`: answer prompts with any decoder; text is printed as it is generated.

    drafting    a drafter proposes tokens and the model verifies them: the text does not change
    exits       tokens exit early; calibration bounds how often they differ from the model's
    experts     a mixture's experts are read from disk: the text does not change

`driver.py` runs every decoder, and `printer.py` prints the text.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import api, driver
from ..common import UserError, check_writable, peak_bytes
from ..driver import Decoder, Generation
from ..experts.opening import open_experts
from ..experts.registry import POLICIES, PREDICTORS
from ..model.backbone import Backbone
from ..speculation import Sampler
from ..speculation.registry import METHODS, drafters_folder, stream_folder
from ..text.prompts import Prompt, read
from . import shared
from .printer import Printer
from .values import counts, natural, number

EXITS = ("trained", "risk", "confidence", "threshold", "exits", "skipped")  # options of --method exits
EXPERTS = ("budget", "policy", "predictor", "known", "reads", "threads", "link", "distance", "width")


def arguments(parser):
    shared.model(parser)
    parser.add_argument("--adapter", metavar="DIR", help="mlx_lm LoRA adapter for this model")
    parser.add_argument(
        "--method", choices=(*METHODS, "exits"), help="decoding method (default: m2r2; plain with --experts)"
    )
    shared.drafting(parser)
    parser.add_argument(
        "--temp",
        type=number(float, 0),
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 decodes greedily (default: 0)",
    )
    parser.add_argument(
        "--top-k", type=natural, default=0, metavar="K", help="sample from the K most likely tokens"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probabilities sum to P",
    )
    parser.add_argument(
        "--min-p",
        type=number(float, 0, 1),
        default=0.0,
        metavar="P",
        help="sample from tokens at least P times as likely as the most likely one",
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="sampling seed (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="WORD", help="stop before this text; may be repeated"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="prompt, or - to read it from standard input; repeat it for the turns of a conversation",
    )
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts, in the formats of `m2r2kit bench`; answers the first turn of each",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="system message, if the model's chat template has one"
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")
    exit_options(
        parser.add_argument_group(
            "early exits (--method exits)", "Decode greedily; some tokens may differ from the model's."
        )
    )
    shared.experts(parser)
    parser.set_defaults(defaults={name: parser.get_default(name) for name in (*EXITS, *EXPERTS)})
    shared.explain(parser, methods=METHODS, policies=POLICIES, predictors=PREDICTORS)


def exit_options(parser):
    """Options of `--method exits`."""
    shared.exits(parser)
    parser.add_argument(
        "--risk",
        type=float,
        default=0.05,
        metavar="R",
        help="bound on the share of tokens that differ from the model's after the same words (default: 0.05)",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="confidence of that bound (default: 0.95)"
    )
    parser.add_argument(
        "--threshold",
        type=number(float, 0, 2),
        metavar="T",
        help="exit from this score of the gate on, whatever the risk; above 1, never exit",
    )
    parser.add_argument("--exits", type=counts, metavar="E,F,..", help="use only these exits")
    parser.add_argument(
        "--skipped",
        choices=("wait", "linear"),
        default="wait",
        help="KV cache of skipped blocks: wait computes it with the next token that runs them, linear "
        "fills it by a linear map of the state (default: wait)",
    )


@dataclass
class Method:
    """A decoder, and how its results are reported.

    Attributes:
        figures: result -> what `--json` prints besides id, tokens and text.
        summary: result -> one line of counts and speed.
        exits: depths at which tokens may exit.
    """

    decoder: Decoder
    figures: Callable[[Generation], dict]
    summary: Callable[[Generation], str]
    exits: tuple[int, ...] = ()


def run(args) -> int:
    """Answer `--prompt`, or each prompt of `--prompts`; `--json` prints one object per answer."""
    asked = read(args.prompts) if args.prompts else [_typed(args.prompt)]
    sampler = Sampler(
        args.temp, args.top_k, args.top_p, args.seed, args.min_p
    )  # checks its arguments before the model loads
    with ExitStack() as stack:
        method = _method(args, sampler, stack)
        backbone = method.decoder.backbone
        firsts = [
            backbone.encode(p.prompt, not args.raw, system=args.system) for p in asked
        ]  # a bad prompt is found before the first answer
        for prompt, first in zip(asked, firsts, strict=True):
            for id, ids, history in _turns(backbone, prompt, first, args):
                sampler = Sampler(args.temp, args.top_k, args.top_p, args.seed, args.min_p)
                out = answer(method, ids, sampler, args)
                if args.json:
                    print(
                        json.dumps({"id": id, "tokens": out.tokens, "text": out.text, **method.figures(out)})
                    )
                history.append(out.text)
                sys.stdout.flush()
        if args.trace:
            method.decoder.trace.save(args.trace)
    return 0


def answer(method: Method, ids: list[int], sampler: Sampler, args) -> Generation:
    """Generate one answer; without `--json`, print it as it is generated."""
    api.draw(method.decoder, sampler)
    if args.json and not args.stop:  # no text is needed before the end
        out = driver.generate(method.decoder, ids, args.max_tokens)
        out.text = method.decoder.backbone.decode(out.tokens)
        return out
    out, show = Generation(), None if args.json else Printer(method.exits)
    for segment in driver.stream(method.decoder, ids, args.max_tokens, args.stop, out):
        if show:
            show(segment)
    if show:
        show.end(method.summary(out))
    return out


# --- prompts --------------------------------------------------------------------------------


def _typed(texts: list[str]) -> Prompt:
    """The prompt and further turns on the command line; `-` is read from standard input."""
    if texts.count("-") > 1:
        raise UserError("Standard input holds one prompt; use --prompt - only once.")
    first, *more = (_standard_input() if text == "-" else _as_utf8(text) for text in texts)
    return Prompt("prompt", first, more_turns=tuple(more))


def _as_utf8(text: str) -> str:
    """An argument decoded as UTF-8, even in an ASCII locale, where Python escapes its bytes."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text  # not UTF-8: encoding the prompt raises a UserError


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("Standard input is closed; give the prompt as text.")
    try:
        content = getattr(sys.stdin, "buffer", sys.stdin).read()
        return content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Standard input cannot be read as UTF-8 ({error}).") from None


def _turns(backbone: Backbone, prompt: Prompt, first: list[int], args) -> Iterator[tuple]:
    """(id, token ids, history) of each turn; the caller appends its answer to the history."""
    history = [prompt.prompt.strip()]
    yield prompt.id, first, history
    for n, turn in enumerate(prompt.more_turns if args.prompt else (), 2):
        ids = backbone.encode(turn, not args.raw, history, args.system)
        history.append(turn.strip())
        yield f"{prompt.id}.{n}", ids, history


# --- methods --------------------------------------------------------------------------------


def _method(args, sampler: Sampler, stack: ExitStack) -> Method:
    """The method that the arguments choose; the stack closes what it opens."""
    if args.method != "exits":
        _check_unused(args, EXITS, "--method exits")
    if not args.experts:
        _check_unused(args, EXPERTS, "--experts STORE")
    if (args.experts or args.method == "exits") and (args.exit, args.draft) != (None, None):
        raise UserError("--exit and --draft are for drafting; leave them out (early exits take --exits).")
    if args.experts:
        if args.method not in (None, "plain"):
            raise UserError(f"--experts does not work with --method {args.method}; leave out one of them.")
        if args.adapter:
            raise UserError("--experts does not work with --adapter; leave out one of them.")
        return _with_experts(args, stack)
    args.method = args.method or "m2r2"
    if args.trace:
        raise UserError("--trace records the routing of experts on disk; give their store with --experts.")
    if args.method == "exits":
        if not sampler.greedy:
            raise UserError("The method exits decodes greedily; leave out --temp.")
        from .generate_exits import with_exits

        return with_exits(args)
    return _drafting(args)


def _check_unused(args, options: tuple[str, ...], needed: str) -> None:
    """Refuse options that would have no effect without `needed`."""
    for name in options:
        if getattr(args, name) != args.defaults[name]:
            raise UserError(f"--{name} has no effect without {needed}; add that, or leave --{name} out.")


def _drafting(args) -> Method:
    backbone, of = Backbone.load(args.model, adapter=args.adapter), args.adapter or args.model
    stream, drafters = stream_folder(of, args.stream), drafters_folder(of, args.drafters)
    decoder = api.decoder_of(backbone, args.method, stream, drafters, args.exit, args.draft)

    def figures(out: Generation) -> dict:
        return {
            "method": args.method,
            "steps": out.steps,
            "accepted": out.accepted,
            "seconds": round(out.seconds, 6),
            "prefill_seconds": round(out.prefill_seconds, 6),
            "stopped": out.stopped,
            "peak_bytes": peak_bytes(),
        }

    def summary(out: Generation) -> str:
        n, right, drafted = len(out.tokens), sum(out.from_draft), sum(out.drafted)
        line = f"{n} tokens in {out.steps} steps, {n / out.seconds:.0f} tokens/s"
        if drafted:
            line += f"; {right} of {drafted} drafts accepted"
            line += " (underlined)" if sys.stdout.isatty() else ""
        return line

    return Method(decoder, figures, summary)


def _with_experts(args, stack: ExitStack) -> Method:
    names = ("budget", "policy", "predictor", "distance", "width", "stream", "known")
    if args.trace:
        check_writable(args.trace)
    settings = {name: getattr(args, name) for name in (*names, "reads", "threads", "link")}
    decoder = open_experts(args.model, args.experts, trace=bool(args.trace), **settings)
    stack.callback(decoder.reader.close)
    record = decoder.reader.store.manifest.mean_record_bytes

    def figures(out: Generation) -> dict:
        work = out.experts
        return {
            "seconds": round(out.seconds, 6),
            "prefill_seconds": round(out.prefill_seconds, 6),
            "stall_seconds": round(work.stall_seconds, 6),
            "stopped": out.stopped,
            **asdict(work.counts),
            "in_time": work.in_time,
            "late": work.late,
            "bytes_asked_for": work.counts.reads * record,
            "peak_bytes": peak_bytes(),
        }

    def summary(out: Generation) -> str:
        work, n = out.experts, len(out.tokens)
        resident, in_time, late, missed = (
            f"{100 * each / max(1, work.counts.accesses):.0f} %"
            for each in (work.counts.resident, work.in_time, work.late, work.counts.missed)
        )
        return (
            f"{n} tokens, {n / (out.seconds - out.prefill_seconds):.0f} tokens/s; experts: {resident} "
            f"resident, {in_time} read in time, {late} late, {missed} missed; "
            f"{work.counts.reads * record / max(1, n) / 1e6:.2f} MB requested per token"
        )

    return Method(decoder, figures, summary)
