"""`m2r2kit generate --method exits`: tokens exit early; calibration bounds how often they differ."""

from ..common import UserError
from ..driver import Generation
from ..exits import trained
from ..exits.calibrate import Promise, promised
from ..exits.decode import NEVER, ExitDecoder
from ..exits.methods import with_gate
from ..model.backbone import Backbone
from .generate import Method


def with_exits(args) -> Method:
    """The decoder with the exits that the arguments choose."""
    backbone = Backbone.load(args.model, adapter=args.adapter)
    folder = trained.folder(args.adapter or args.model, args.trained) / "m2r2"
    module, facts = trained.load(backbone, folder, "m2r2")
    if args.exits and (unknown := set(args.exits) - set(module.config.exits)):
        raise UserError(
            f"No exit was trained at {', '.join(map(str, sorted(unknown)))}; "
            f"choose among {', '.join(map(str, module.config.exits))}, or train others."
        )
    name = "m2r2" if args.skipped == "wait" else f"m2r2-{args.skipped}"
    method = with_gate(name, backbone, module, "arla", args.skipped, facts.get("use", {}).get(name))
    promise = chosen(args, facts)
    if args.exits:
        use = tuple(j for j, exit in enumerate(module.config.exits) if exit in args.exits)
        if use != method.used(0):  # the calibration is of other exits
            method.use, promise = use, Promise(promise.threshold)
    threshold = NEVER if promise.threshold is None else promise.threshold
    decoder = ExitDecoder(backbone, *method.parts, method.used(threshold))
    decoder.threshold = method.levels(threshold)

    def figures(out: Generation) -> dict:
        return {
            "method": "exits",
            "depth": out.depth,
            "threshold": threshold,
            "seconds": round(out.seconds, 6),
            "stopped": out.stopped,
        }

    def summary(out: Generation) -> str:
        count = [f"{out.depth.count(d)} at {d}" for d in sorted(set(out.depth))]
        return (
            f"{len(out.tokens)} tokens, {len(out.tokens) / out.seconds:.0f} tokens/s; "
            f"exits after block: {', '.join(count)} of {backbone.depth}; {promise}"
        )

    return Method(decoder, figures, summary, tuple(args.exits or module.config.exits))


def chosen(args, facts: dict) -> Promise:
    """The threshold for the requested risk, and its calibrated bound."""
    if args.threshold is not None:
        return Promise(args.threshold)
    return promised(facts.get("calibration", {}).get(args.skipped), args.risk, args.confidence)
