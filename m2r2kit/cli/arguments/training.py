"""What `train`, and what prepares a model for a wing, take."""

import argparse
from pathlib import Path

from ...exits.registry import CALIBRATED
from ...exits.registry import KINDS as EXIT_KINDS
from ...experts.registry import TRAINED
from ...speculation.registry import TRAINED as DRAFTERS
from ...stream.registry import FORMS
from .shared import corpus, minutes, model, processes, seed, training_rows, tuning
from .values import count, counts, natural, number, size, some_of


def train_backbone(parser):
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run; if it exists, go on there"
    )
    corpus(parser)
    parser.add_argument(
        "--type", choices=("llama", "olmoe"), help="dense, or a mixture of experts (default: llama)"
    )
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="for olmoe: the dense model to start from and learn from"
    )
    parser.add_argument("--tokens", type=count, metavar="N", help="tokens to train on, all in all")
    minutes(parser)
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="write the model here as a Hugging Face folder"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with settings of a run (PretrainConfig, OlmoeConfig)",
    )
    processes(parser)


def train_stream(parser):
    model(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save it (default: 'stream' inside the model's folder)",
    )
    parser.add_argument(
        "--form", choices=FORMS, default="block", help="what an accelerated block computes (default: block)"
    )
    parser.add_argument("--exit", type=count, metavar="E", help="block after which the stream is read")
    parser.add_argument(
        "--rate",
        type=number(float, 0, above=True),
        metavar="R",
        help="how fast the stream runs ahead (default: to reach the final state at its exit)",
    )
    parser.add_argument(
        "--rank",
        type=natural,
        metavar="R",
        help="rank of its changes of the base matrices; 0 for none (default: full)",
    )
    parser.add_argument(
        "--deep",
        type=number(float, 0),
        metavar="SHARE",
        help="read the slow keys of the block at this share of the depth; 0 for none (default: 0.25)",
    )
    parser.add_argument(
        "--near",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also read those of its own blocks, which drafts then have to compute (default: no)",
    )
    parser.add_argument(
        "--carry",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also begin with the last state of the token before, as in EAGLE (default: yes)",
    )
    parser.add_argument(
        "--ffn-width", type=natural, metavar="W", help="width of an FFN of its own; 0 for none"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train other readouts of the same size for as long, and record them all; saves none",
    )
    training_rows(parser)
    tuning(parser)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="begin with this trained stream, of this model or of one much like it, instead of anew",
    )
    processes(parser)


def train_drafter(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(DRAFTERS),
        required=True,
        metavar="A,B,..",
        help=f"which ways of drafting, of {', '.join(DRAFTERS)}, or all; they learn from the same rows",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save it (default: 'drafters/KIND' inside the model's folder)",
    )
    parser.add_argument(
        "--exit", type=count, metavar="E", help="block after which kangaroo and deed draft (default: 2)"
    )
    training_rows(parser)
    tuning(parser)


def train_exits(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(EXIT_KINDS),
        default=["m2r2"],
        metavar="A,B,..",
        help=f"what to train, of {', '.join(EXIT_KINDS)}, or all, from the same rows (default: m2r2)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save it (default: 'exits/KIND' inside the model's folder)",
    )
    parser.add_argument(
        "--exits",
        type=counts,
        metavar="E,F,..",
        help="after so many blocks a token may leave; for shallow, the number of its blocks",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="for m2r2: begin the first exit with this trained stream (`m2r2kit train stream`)",
    )
    parser.add_argument(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="then choose exits and measure risks; --no-calibrate leaves it to `m2r2kit calibrate`",
    )
    parser.add_argument(
        "--router-only",
        action="store_true",
        help="train a new router for exits that are saved already; the rest of them stays",
    )
    training_rows(parser)


def train_predictor(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(TRAINED),
        default=list(TRAINED),
        metavar="A,B,..",
        help=f"which, of {', '.join(TRAINED)} (default: all); they learn from the same rows",
    )
    parser.add_argument(
        "--exits",
        type=counts,
        metavar="E,F,..",
        help="where the stream's intervals end (default: after every block)",
    )
    parser.add_argument(
        "--rate",
        type=number(float, 1),
        default=2.0,
        metavar="R",
        help="how fast the stream m2r2 runs ahead, and the blocks that the direct map names (default: 2)",
    )
    parser.add_argument("--rank", type=natural, default=0, metavar="R", help="of its changes (default: 0)")
    parser.add_argument(
        "--ffn-width",
        type=count,
        default=320,
        metavar="W",
        help="of its own FFN in each block (default: 320)",
    )
    training_rows(parser)
    parser.set_defaults(rows=480)  # all states of all blocks are kept: 6 MB a row of the pocket model


def calibrate(parser):
    model(parser)
    parser.add_argument(
        "--kind",
        type=some_of(CALIBRATED),
        default=["m2r2"],
        metavar="A,B,..",
        help=f"what to calibrate, of {', '.join(CALIBRATED)}, or all (default: m2r2)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where it was trained (default: 'exits/KIND' inside the model's folder)",
    )
    corpus(parser)
    seed(parser)


def make_moe(parser):
    parser.add_argument("out", type=Path, metavar="DIR", help="folder of the model")
    parser.add_argument("--size", type=size, metavar="SIZE", help="at least so large (default: 4.5GB)")
    parser.add_argument(
        "--widen",
        type=number(int, 2),
        metavar="K",
        help="instead of random weights: a trained model with experts K times as wide, which says the same",
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="with --widen: which one (default: data/pocket-moe)"
    )
    parser.add_argument(
        "--width",
        type=number(int, 8),
        metavar="D",
        help="of the stream and of an expert, a multiple of 8; an expert has 12 D^2 bytes (default: 512)",
    )
    seed(parser)


def pack(parser):
    parser.add_argument("model", metavar="MODEL", help="a mixture of experts that mlx_lm loads")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the store")
    parser.add_argument(
        "--verify", action="store_true", help="read all of a store that is there, and compare checksums"
    )
