"""The arguments of the command line: one function for each command, called with its parser."""

from .decoding import generate
from .measuring import bench_exits, bench_experts, bench_map, bench_memory, bench_speculation
from .shared import MODEL, MOE, drafters, model, stream
from .training import (
    calibrate,
    make_moe,
    pack,
    train_backbone,
    train_drafter,
    train_exits,
    train_predictor,
    train_stream,
)
from .values import budget

__all__ = [
    "MODEL",
    "MOE",
    "bench_exits",
    "bench_experts",
    "bench_map",
    "bench_memory",
    "bench_speculation",
    "budget",
    "calibrate",
    "drafters",
    "generate",
    "make_moe",
    "model",
    "pack",
    "stream",
    "train_backbone",
    "train_drafter",
    "train_exits",
    "train_predictor",
    "train_stream",
]
