"""`m2r2kit generate`: answer prompts; text streams, and drafted tokens are told apart."""

import json
import sys
from pathlib import Path

from .. import driver
from ..common import peak_bytes
from ..driver import Generation
from ..model.backbone import Backbone
from ..speculation import Sampler, Speculation
from ..speculation.reference import MlxLm
from ..speculation.registry import METHODS, drafters_folder, ready, stream_folder
from ..text.prompts import Prompt, read
from . import generate_exits, shared
from .values import counts, natural, number


def arguments(parser):
    shared.model(parser)
    parser.add_argument(
        "--method", choices=(*METHODS, "exits"), help="how to decode (default: m2r2, with --experts plain)"
    )
    shared.drafting(parser)
    parser.add_argument(
        "--temp",
        type=number(float, 0),
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default)",
    )
    parser.add_argument("--top-k", type=natural, default=0, metavar="K", help="sample among the K likeliest")
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        default=1.0,
        metavar="P",
        help="sample among the likeliest that hold this share of the probability",
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="seed of sampling (default: 0)")
    leaving(parser.add_argument_group("method exits", "tokens leave early, greedily, and some may differ"))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="what to answer")
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one JSON object a line, as for bench; of several turns the first",
    )
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    shared.experts(parser)


def leaving(parser):
    """How `generate --method exits` decides."""
    shared.exits(parser)
    parser.add_argument(
        "--risk",
        type=float,
        default=0.05,
        metavar="R",
        help="share of tokens that may differ from the model's (default: 0.05)",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="that the risk is kept (default: 0.95)"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="leave from this probability on, whatever the risk"
    )
    parser.add_argument("--exits", type=counts, metavar="E,F,..", help="leave at these exits only")
    parser.add_argument(
        "--skipped",
        choices=("wait", "linear"),
        default="wait",
        help="skipped blocks are made up for with the next token that goes deep, or filled (default: wait)",
    )


def run(args) -> int:
    """Answer `--prompt` or each prompt of `--prompts`; `--json` prints one object a prompt."""
    prompts = read(args.prompts) if args.prompts else [Prompt("prompt", args.prompt)]
    if args.experts:
        from . import generate_experts

        return generate_experts.run(args, prompts)
    args.method = args.method or "m2r2"
    backbone = Backbone.load(args.model)
    ids = [backbone.encode(p.prompt, chat=not args.raw) for p in prompts]  # all are checked first
    if args.method == "exits":
        return generate_exits.run(args, backbone, prompts, ids)
    folders = stream_folder(args.model, args.stream), drafters_folder(args.model, args.drafters)
    who, drafts = None, 0
    if args.method != "mlx_lm":
        who, drafts = ready(args.method, backbone, *folders, args.exit, args.draft)
    for prompt, tokens in zip(prompts, ids, strict=True):
        sampler = Sampler(args.temp, args.top_k, args.top_p, args.seed)
        show = None if args.json else Stream(backbone)
        if who is None:
            decoder = MlxLm(backbone, _mlx_lm_sampler(args))
        else:
            decoder = Speculation(backbone, who, drafts, sampler)
        out = driver.generate(decoder, tokens, args.max_tokens, show)
        print(json.dumps(as_json(backbone, prompt.id, args.method, out))) if args.json else show.end(out)
        sys.stdout.flush()
    return 0


def as_json(backbone: Backbone, id: str, method: str, out: Generation) -> dict:
    """The object that `--json` prints for a prompt."""
    return {
        "id": id,
        "method": method,
        "tokens": out.tokens,
        "text": backbone.decode(out.tokens),
        "steps": out.steps,
        "accepted": out.accepted,
        "seconds": round(out.seconds, 6),
        "prefill_seconds": round(out.prefill_seconds, 6),
        "stopped": out.stopped,
        "peak_bytes": peak_bytes(),
    }


def _mlx_lm_sampler(args):
    if args.temp == 0:
        return None
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(args.seed)
    return make_sampler(args.temp, top_p=args.top_p if args.top_p < 1 else 0.0, top_k=args.top_k)


class Stream:
    """Prints text as it comes. On a terminal, drafted tokens are underlined."""

    UNDERLINE, PLAIN = "\x1b[4m", "\x1b[0m"

    def __init__(self, backbone: Backbone):
        self.detokenizer = backbone.tokenizer.detokenizer
        self.eos, self.colours = backbone.eos, sys.stdout.isatty()

    def __call__(self, tokens: list[int], from_draft: list[bool]) -> None:
        for token, drafted in zip(tokens, from_draft, strict=True):
            if token in self.eos:
                continue
            self.detokenizer.add_token(token)
            text = self.detokenizer.last_segment
            print(
                f"{self.UNDERLINE}{text}{self.PLAIN}" if drafted and self.colours else text,
                end="",
                flush=True,
            )

    def close(self) -> None:
        """The rest of the text."""
        self.detokenizer.finalize()
        print(self.detokenizer.last_segment)

    def end(self, out: Generation) -> None:
        """The rest of the text, and one line of what it took."""
        self.close()
        drafted = sum(out.from_draft)
        line = f"{len(out.tokens)} tokens in {out.steps} steps, {len(out.tokens) / out.seconds:.0f} tokens/s"
        if sum(out.drafted):
            line += f"; {drafted} of {sum(out.drafted)} drafts were right" + (
                " (underlined)" if self.colours else ""
            )
        print(line, file=sys.stderr)
