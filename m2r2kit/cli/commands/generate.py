"""`m2r2kit generate`: answer prompts; text streams, and drafted tokens are told apart."""

import json
import sys

from ... import driver
from ...common import peak_bytes
from ...driver import Generation
from ...model.backbone import Backbone
from ...speculation import Sampler, Speculation
from ...speculation.reference import MlxLm
from ...speculation.registry import drafter, drafters_folder, stream_folder, tuned_drafts
from ...text.prompts import Prompt, read
from . import generate_exits


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
    who = None
    if args.method != "mlx_lm":
        who = drafter(args.method, backbone, folders[0], args.exit, folders[1], stops=args.draft is None)
    drafts = tuned_drafts(args.method, *folders) if args.draft is None else args.draft
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
