"""What the commands of `bench` take."""

import argparse
from pathlib import Path

from ...exits.registry import METHODS as EXIT_METHODS
from ...speculation.registry import METHODS
from .shared import disk, drafting, exits, model, stream, streaming
from .values import budget, count, counts, natural, number, shares, size, some_of


def bench_speculation(parser):
    model(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one JSON object a line with 'id' and 'prompt', or MT-Bench, Koala or Self-Instruct as "
        "published (default: all of data/prompts)",
    )
    parser.add_argument(
        "--methods",
        type=some_of(METHODS),
        default=list(METHODS)[:4],
        metavar="A,B,..",
        help=f"what to compare, of {', '.join(METHODS)}, or all (default: the first four)",
    )
    drafting(parser)
    parser.add_argument(
        "--repeats", type=count, default=5, metavar="N", help="timed rounds of all methods (default: 5)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each kind")
    parser.add_argument("--record", action="store_true", help="add the result to data/results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as well")


def bench_exits(parser):
    model(parser)
    exits(parser)
    parser.add_argument(
        "--methods",
        type=some_of(EXIT_METHODS),
        default=["m2r2", "m2r2-oracle", "calm"],
        metavar="A,B,..",
        help=f"what to compare, of {', '.join(EXIT_METHODS)}, or all",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one JSON object a line (default: all of data/prompts)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each kind")
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="stop here (default: 64)")
    parser.add_argument(
        "--timed",
        type=natural,
        default=8,
        metavar="N",
        help="prompts of each kind that are decoded by the clock; 0 for none (default: 8)",
    )
    parser.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="timed rounds of all methods (default: 3)"
    )
    parser.add_argument("--record", action="store_true", help="add the result to data/results")


def bench_experts(parser):
    model(parser)
    parser.add_argument("--experts", type=Path, metavar="STORE", help="the packed experts of the model")
    parser.add_argument(
        "--budgets",
        type=shares,
        default=[0.125, 0.25, 0.5],
        metavar="A,B,..",
        help="shares of all experts that fit the memory (default: 12.5%%,25%%,50%%)",
    )
    streaming(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one JSON object a line (default: all of data/prompts)"
    )
    parser.add_argument(
        "--limit", type=count, default=2, metavar="N", help="only the first N of each kind (default: 2)"
    )
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="stop here (default: 64)")
    parser.add_argument(
        "--repeats", type=count, default=5, metavar="N", help="timed rounds of all arms (default: 5)"
    )
    parser.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the model wholly in memory; --no-resident where it does not fit",
    )
    parser.add_argument("--record", action="store_true", help="add the result to data/results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file as well")
    parser.add_argument(
        "--plan",
        nargs="?",
        const="all",
        metavar="MODEL",
        help="compute what streaming would give a known model (default: all of them), without running it",
    )


def bench_memory(parser):
    model(parser)
    parser.add_argument(
        "--experts", type=Path, required=True, metavar="STORE", help="the packed experts of the model"
    )
    parser.add_argument(
        "--budget",
        type=budget,
        default=0.1,
        metavar="SIZE",
        help="memory for experts: 64MB, 25%% (default: 10%%)",
    )
    parser.add_argument(
        "--most",
        type=size,
        default=10**9,
        metavar="SIZE",
        help="what the process may take in all, or the command fails (default: 1GB)",
    )
    parser.add_argument(
        "--predictor",
        choices=("nothing", "previous", "next-router"),
        default="next-router",
        help="who names experts ahead of time (default: next-router)",
    )
    disk(parser)
    parser.add_argument(
        "--prompt",
        default="The sea was calm, and the ship lay at anchor near the old harbour.",
        metavar="TEXT",
        help="what to continue",
    )
    parser.add_argument("--max-tokens", type=count, default=128, metavar="N", help="stop here (default: 128)")
    parser.add_argument("--record", action="store_true", help="add the result to data/results")


def bench_map(parser):
    model(parser)
    stream(parser)
    parser.add_argument(
        "--method",
        choices=("early-exit", "m2r2"),
        default="early-exit",
        help="who drafts: the bare residual at any exit (default), or the stream at its own",
    )
    parser.add_argument(
        "--exits", type=counts, metavar="E,F,..", help="after so many blocks (default: some, or the stream's)"
    )
    parser.add_argument(
        "--drafts", type=number(int, 2, 16), default=8, metavar="K", help="up to so many drafts (default: 8)"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one JSON object a line (default: all of data/prompts)"
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each kind")
    parser.add_argument("--max-tokens", type=count, default=64, metavar="N", help="stop here (default: 64)")
    parser.add_argument("--record", action="store_true", help="add the result to data/results")
