"""`m2r2kit bench experts --plan`: estimated streaming speed of known models on known machines."""

from ..bench.plan import CARDS, MACHINES, Card, Machine, check, plan
from ..bench.tables import Table
from ..common import UserError

HEADS = ("machine", "MB/token", "budget", "hit", "C ms", "I ms", "I/C", "bound", "on demand", "ahead", "why")


def run(args) -> int:
    """Print the estimates, and Flash-MoE's figures beside the same arithmetic."""
    cards = [card for card in CARDS if args.plan in ("all", card.name)]
    if not cards:
        known = ", ".join(card.name for card in CARDS)
        raise UserError(f"There is no plan for '{args.plan}'; choose {known}.")
    print("Computed, not measured: upper bounds in tokens/s at 4 bits, for uniform routing.\n")
    for card in cards:
        print(f"{card.name}: {card.all_bytes(4) / 1e9:.1f} GB of experts ({card.source})")
        print(f"{Table(HEADS, [cells(card, machine) for machine in MACHINES], left=HEADS[-1:])}\n")
    for machine in MACHINES:
        print(f"{machine.name}: {machine.source}")
    print("\nFlash-MoE (their claims) beside the same arithmetic:")
    heads = ("", "published", "computed", "", "")
    rows = [(r.what, f"{r.published:,.2f}", f"{r.computed:,.2f}", r.unit, r.note) for r in check()]
    print(Table(heads, rows, left=("",)))
    return 0


def cells(card: Card, machine: Machine) -> tuple[str, ...]:
    """The columns `HEADS` of a model on a machine."""
    found = plan(card, machine)
    if not found:
        return machine.name, "-", "-", "-", "-", "-", "-", "-", "-", "-", "does not fit"
    return (
        machine.name, f"{card.token_bytes(4) / 1e6:.0f}", f"{found.budget / 1e9:.1f} GB", f"{found.hit:.0%}",
        f"{1e3 * found.compute:.1f}", f"{1e3 * found.read:.1f}", f"{found.ratio:.2f}", f"{found.bound:.2f}x",
        f"{found.on_demand:.1f}", f"{found.ahead:.1f}", found.why,
    )  # fmt: skip
