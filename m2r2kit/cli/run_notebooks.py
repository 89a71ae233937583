"""`m2r2kit notebooks`: run the notebooks, check them as CI does, or rebuild their outputs."""

from . import notebooks


def arguments(parser):
    parser.add_argument(
        "action",
        choices=("run", "check", "build"),
        help="run: execute copies; check: all that CI checks; build: execute, clean and write back",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="number (04), name or file of a notebook (default: all)"
    )
    parser.add_argument(
        "--full", action="store_true", help="check with the notebook's own parameters, not CI's small ones"
    )


def run(args) -> int:
    """Run, check or build; 1 if a notebook fails."""
    if args.action == "check":
        return notebooks.check(args.names, full=args.full)
    return notebooks.run(args.names) if args.action == "run" else notebooks.build(args.names)
