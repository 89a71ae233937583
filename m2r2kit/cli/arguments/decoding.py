"""What `generate` takes."""

from pathlib import Path

from ...speculation.registry import METHODS
from .shared import drafting, exits, experts, model
from .values import counts, natural, number


def generate(parser):
    model(parser)
    parser.add_argument(
        "--method", choices=(*METHODS, "exits"), help="how to decode (default: m2r2, with --experts plain)"
    )
    drafting(parser)
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
    experts(parser)


def leaving(parser):
    """How `generate --method exits` decides."""
    exits(parser)
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
