"""`m2r2kit bench speculation`: the arms side by side, equality first, then time."""

import json
import shlex
import sys

from tqdm import tqdm

from .. import prompts as prompt_files
from .. import records
from ..backbone import Backbone
from ..bench import Arm, compare
from ..errors import UserError
from ..speculation.loop import MOST_DRAFTS
from ..speculation.methods import drafter, stream_folder, tuned_drafts


def run(args) -> int:
    """Measure, print a table, write `--json`, and with `--record` add a record. 1 if an arm differs."""
    prompts = prompt_files.read(args.prompts or prompt_files.ALL)
    prompts = prompt_files.first_of_each_kind(prompts, args.limit)
    backbone = Backbone.load(args.model)
    folder = stream_folder(args.model, args.stream)
    drafts = tuned_drafts(folder) if args.draft is None else args.draft
    if not 1 <= drafts <= MOST_DRAFTS:
        raise UserError(f"The number of drafts must lie between 1 and {MOST_DRAFTS}; got {drafts}.")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"There is no folder {args.json.parent} to write {args.json.name} in.")
    names = args.methods if "plain" in args.methods else ["plain", *args.methods]
    arms = []
    for name in names:
        who = None if name == "mlx_lm" else drafter(name, backbone, folder, args.exit)
        arms.append(Arm(name, who, drafts if name in ("early-exit", "m2r2") else 0))
    ids = [backbone.encode(p.prompt) for p in prompts]
    rounds = len(prompts) * len(arms) * (args.repeats + 1)
    with tqdm(total=rounds, unit="text", disable=not sys.stderr.isatty()) as bar:
        figures = compare(
            backbone,
            arms,
            ids,
            [p.kind for p in prompts],
            args.max_tokens,
            args.repeats,
            lambda: bar.update(),
        )
    print(table(figures))
    settings = {
        "model": str(args.model).rstrip("/").rsplit("/", 1)[-1],
        "model_sha256": backbone.sha256,
        "exit": next((a.drafter.exit for a in arms if a.drafts), None),
        "drafts": drafts,
        "max_tokens": args.max_tokens,
        "repeats": args.repeats,
        "prompts": len(prompts),
        "limit": args.limit,
    }
    if args.json:
        temporary = args.json.with_name(args.json.name + ".new")
        temporary.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n")
        temporary.replace(args.json)
    if args.record:
        records.append(
            "speculation",
            command=shlex.join(["m2r2kit", *sys.argv[1:]]),
            settings=settings,
            figures=figures,
            prompts_sha256=prompt_files.sha256(prompts),
        )
    return 0 if all(arm.equal for arm in arms) else 1


def table(figures: dict) -> str:
    """The arms in aligned columns; an arm whose text differs has no speed."""
    lines = [
        f"{'method':12} {'speed-up':>8} {'from..to':>12} {'predicted':>9} {'tau':>5} {'c':>5} {'v':>5}  "
        "equal  acceptance"
    ]
    for name, arm in figures["arms"].items():
        speed, predicted = arm["speedup_vs_plain"], arm["predicted_speedup"]
        median = f"{speed['median']:.2f}x" if speed else "-"
        span = f"{speed['min']:.2f}..{speed['max']:.2f}" if speed else "-"
        guess = f"{predicted:.2f}x" if predicted else "-"
        equal = "yes" if arm["mismatches"] == 0 else f"yes ({arm['ties']} ties)" if arm["equal"] else "NO"
        shares = " ".join(f"{a:.2f}" for a in arm["acceptance"])
        lines.append(
            f"{name:12} {median:>8} {span:>12} {guess:>9} {arm['tau']:5.2f} {arm['draft_cost']:5.2f} "
            f"{arm['verify_cost']:5.2f}  {equal:5}  {shares}"
        )
    for kind, arms in figures["per_kind"].items():
        if kind:
            lines.append(
                f"{kind:12} " + "  ".join(f"{n} {r['median']:.2f}x" for n, r in arms.items() if n != "plain")
            )
    return "\n".join(lines)
