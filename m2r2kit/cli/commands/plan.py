"""`m2r2kit bench experts --plan`: what streaming would give known models on known machines."""

from ...bench.plan import CARDS, MACHINES, check, plan
from ...common import UserError

HEADS = ("MB/token", "budget", "hit", "C ms", "I ms", "I/C", "bound", "on demand", "ahead")


def run(args) -> int:
    """Print the plans, and Flash-MoE's figures beside what the same arithmetic gives."""
    cards = [card for card in CARDS if args.plan in ("all", card.name)]
    if not cards:
        known = ", ".join(card.name for card in CARDS)
        raise UserError(f"There is no card '{args.plan}' to plan with; choose {known}.")
    print("Computed, not measured: tokens/s at most, 4 bit, as if routers had no preference.\n")
    for card in cards:
        B = card.token_bytes(4)
        print(f"{card.name}: {card.all_bytes(4) / 1e9:.1f} GB of experts ({card.source})")
        print(f"  {'':22} " + " ".join(f"{head:>9}" for head in HEADS))
        for machine in MACHINES:
            found = plan(card, machine)
            cells = ["does not fit"]
            if found:
                cells = [
                    f"{B / 1e6:.0f}", f"{found.budget / 1e9:.1f} GB", f"{found.hit:.0%}",
                    f"{1e3 * found.compute:.1f}", f"{1e3 * found.read:.1f}", f"{found.ratio:.2f}",
                    f"{found.bound:.2f}x", f"{found.on_demand:.1f}", f"{found.ahead:.1f}", f" {found.why}",
                ]  # fmt: skip
            print(f"  {machine.name:22} " + " ".join(f"{cell:>9}" for cell in cells))
        print()
    for machine in MACHINES:
        print(f"{machine.name}: {machine.source}")
    print("\nFlash-MoE (their claims) beside the same arithmetic:")
    for row in check():
        print(f"  {row.what:66} {row.published:>14,.2f} {row.computed:>14,.2f} {row.unit:5} {row.note}")
    return 0
