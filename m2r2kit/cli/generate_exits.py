"""`m2r2kit generate --method exits`: tokens leave early, with a promise of how often they differ."""

import json
import sys

from .. import driver
from ..common import UserError
from ..driver import Generation
from ..exits import trained
from ..exits.calibrate import calibrate
from ..exits.decode import NEVER, ExitDecoder
from ..exits.methods import with_gate
from ..model.backbone import Backbone
from ..text.prompts import Prompt

SHADES = (22, 28, 34, 40)  # of green in a terminal of 256 colours: the earlier a token left, the lighter


def run(args, backbone: Backbone, prompts: list[Prompt], ids: list[list[int]]) -> int:
    """Answer each prompt; `--json` prints one object a prompt."""
    module, facts = trained.load(backbone, trained.folder(args.model, args.trained) / "m2r2", "m2r2")
    if args.exits and (unknown := set(args.exits) - set(module.config.exits)):
        raise UserError(
            f"It was not trained for exits at {', '.join(map(str, sorted(unknown)))}; "
            f"choose among {', '.join(map(str, module.config.exits))}, or train for others."
        )
    threshold, promise = chosen(args, facts)
    name = "m2r2" if args.skipped == "wait" else f"m2r2-{args.skipped}"
    method = with_gate(name, backbone, module, "arla", args.skipped, facts.get("use", {}).get(name))
    if args.exits:
        method.use = tuple(j for j, exit in enumerate(module.config.exits) if exit in args.exits)
    decoder = ExitDecoder(backbone, *method.parts, method.used(threshold))
    decoder.threshold = method.levels(threshold)
    for prompt, tokens in zip(prompts, ids, strict=True):
        show = None if args.json else Shaded(backbone, args.exits or module.config.exits)
        out = Generation()
        for step in driver.drive(decoder, tokens, args.max_tokens, out):
            if show:
                show(step.tokens, [step.depth])
        if args.json:
            print(json.dumps(as_json(backbone, prompt.id, threshold, out)))
        else:
            show.end(out, promise)
        sys.stdout.flush()
    return 0


def chosen(args, facts: dict) -> tuple[float, str]:
    """The threshold for the asked risk, and what is promised of it, in words."""
    if args.threshold is not None:
        return args.threshold, f"threshold {args.threshold}, nothing promised"
    known = facts.get("calibration", {}).get(args.skipped)
    if known is None:
        raise UserError("These exits were never calibrated; run `m2r2kit calibrate`, or give a --threshold.")
    found = calibrate(known["thresholds"], known["means"], known["texts"], args.risk, args.confidence)
    if found is None:
        return NEVER, f"no threshold keeps a risk of {args.risk}: all blocks for every token"
    return found, f"at most {args.risk:.0%} differ, with a confidence of {args.confidence:.0%}"


def as_json(backbone: Backbone, id: str, threshold: float, out: Generation) -> dict:
    """The object that `--json` prints for a prompt."""
    return {
        "id": id,
        "method": "exits",
        "tokens": out.tokens,
        "text": backbone.decode(out.tokens),
        "depth": out.depth,
        "threshold": threshold,
        "seconds": round(out.seconds, 6),
        "stopped": out.stopped,
    }


class Shaded:
    """Prints text as it comes; on a terminal, a token is the greener the earlier it left, and its depth
    stands behind it where it is not the whole model's."""

    def __init__(self, backbone: Backbone, exits: tuple[int, ...]):
        self.detokenizer, self.eos, self.depth = backbone.tokenizer.detokenizer, backbone.eos, backbone.depth
        self.shade = dict(zip(exits, reversed(SHADES), strict=False))
        self.colours = sys.stdout.isatty()

    def __call__(self, tokens: list[int], depths: list[int]) -> None:
        for token, depth in zip(tokens, depths, strict=True):
            if token in self.eos:
                continue
            self.detokenizer.add_token(token)
            text = self.detokenizer.last_segment
            if self.colours and depth in self.shade:
                text = f"\x1b[38;5;{self.shade[depth]}m{text}\x1b[2m{depth}\x1b[0m"
            print(text, end="", flush=True)

    def end(self, out: Generation, promise: str) -> None:
        """The rest of the text, and one line of what it took."""
        self.detokenizer.finalize()
        print(self.detokenizer.last_segment)
        count = [f"{out.depth.count(d)} at {d}" for d in sorted(set(out.depth))]
        print(
            f"{len(out.tokens)} tokens, {len(out.tokens) / out.seconds:.0f} tokens/s; "
            f"left after block: {', '.join(count)} of {self.depth}; {promise}",
            file=sys.stderr,
        )
