"""The training and held-out text of `train`, the same for all modules that are trained for a model."""

import hashlib
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from ..common import UserError, cache_dir, whole
from ..model.backbone import Backbone
from . import download
from .corpus import ASSISTANT, KINDS, USER, documents
from .self_generated import beginnings, continue_greedily, questions

WINDOW = 192  # tokens of a row
BEGINNING = 24  # tokens of a beginning that the model continues where there are no questions
LONGEST = 112  # the most tokens of a question
HELD_OUT_ROWS = 96
OWN = 0.9  # share of rows that the model generates
VERSION = 1  # of this way of making rows; a change makes kept rows invalid
SMALL = 1 << 28  # the most parameters of a model that is converted to float32 for training


def for_training(model) -> Backbone:
    """Load the frozen model; a small one in float32, for exact states and logits as training targets."""
    backbone = Backbone.load(model)
    if sum(w.size for _, w in tree_flatten(backbone.model.parameters())) <= SMALL:
        backbone.model.set_dtype(mx.float32)
        backbone.refresh()
    return backbone


def text(backbone: Backbone, corpus, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and held-out rows, int32 (rows, WINDOW) and (HELD_OUT_ROWS, WINDOW).

    Held-out rows come from documents that no training sees. The model generates most rows, which takes
    minutes, so they are kept in the cache folder for trainings with the same settings.

    Args:
        corpus: folder of the corpus; None downloads it.

    Raises:
        UserError: the corpus is missing or cannot be downloaded.
    """
    all_documents = documents(Path(corpus) if corpus else download.corpus_folder())
    settings = [VERSION, backbone.sha256, rows, seed, OWN, WINDOW, HELD_OUT_ROWS]
    key = hashlib.sha256(json.dumps(settings).encode())
    for d in all_documents:
        key.update(f"{d.name}\0{d.text}\0".encode())
    file = cache_dir() / f"text-{key.hexdigest()[:16]}.npz"
    try:
        with np.load(file) as kept:
            return kept["train"], kept["held_out"]
    except Exception:  # missing, cut short or damaged: NumPy, zipfile and zlib raise different errors
        pass
    train, held_out = write(backbone, all_documents, rows, seed)
    try:
        with whole(file) as new:
            np.savez_compressed(new, train=train, held_out=held_out)
    except UserError as error:  # training continues; the next training generates the text again
        print(f"The training text is not kept: {error}", file=sys.stderr)
    return train, held_out


def write(backbone: Backbone, all_documents: list, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate what `text` returns."""
    train, held_out = (tokens_of(backbone, all_documents, held, rows, seed) for held in (False, True))
    train = windows(backbone, train, rows, OWN, seed)
    return train, windows(backbone, held_out, HELD_OUT_ROWS, OWN, seed + 1)


def tokens_of(
    backbone: Backbone, all_documents: list, held_out: bool, rows: int, seed: int
) -> dict[str, np.ndarray]:
    """Concatenated token ids of each kind's documents, in random order, enough to draw `rows` rows from.

    Args:
        held_out: whether to take the held-out documents or the others.
    """
    ids: dict[str, list[int]] = {kind: [] for kind in KINDS}
    budget = 40 * rows * WINDOW  # characters of each kind, at about 3 a token
    for d in np.random.default_rng(seed).permutation(np.array(all_documents, dtype=object)):
        if d.held_out == held_out and len(ids[d.kind]) * 3 < budget:
            ids[d.kind] += [
                *backbone.tokenizer.encode(d.text, add_special_tokens=False, verbose=False),
                *sorted(backbone.eos)[:1],
            ]
    return {kind: np.array(i, dtype=np.int32) for kind, i in ids.items()}


def windows(
    backbone: Backbone, tokens: dict[str, np.ndarray], rows: int, own: float, seed: int = 0
) -> np.ndarray:
    """Shuffled rows of text, int32 (rows, WINDOW), with equally many of each kind.

    Args:
        tokens: token ids of each kind.
        own: share of rows that the model generates; the others are cut from the corpus.
    """
    rng = np.random.default_rng(seed)
    kinds = [ids for ids in tokens.values() if len(ids) > WINDOW]
    parts = []
    for i, ids in enumerate(kinds):
        share = rows // len(kinds) + (i < rows % len(kinds))
        written = round(share * own)
        starts = rng.integers(0, len(ids) - WINDOW, share - written)
        parts += [ids[s : s + WINDOW] for s in starts]
        parts += _written(backbone, questions_or_beginnings(backbone, ids, written, rng))
    return np.stack(parts)[rng.permutation(len(parts))].astype(np.int32)


def questions_or_beginnings(
    backbone: Backbone, ids: np.ndarray, rows: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """`rows` starts that the model continues, from the token ids of one kind.

    They are whole questions if the tokenizer has the pocket models' turn marks and `ids` has questions, and
    else random beginnings.
    """
    asks, answers = (backbone.tokenizer.convert_tokens_to_ids(mark) for mark in (USER, ASSISTANT))
    known = asks != answers and {asks, answers} <= set(range(backbone.config["vocab_size"]))
    found = questions(ids, asks, answers, rows, LONGEST, rng) if known and rows else []
    return found or beginnings(ids, rows, BEGINNING, rng)


def _written(backbone: Backbone, starts: list[np.ndarray]) -> list[np.ndarray]:
    """Rows that continue the starts greedily, in batches of similar lengths."""
    starts = sorted(starts, key=len)
    batch = 64 if mx.default_device() == mx.Device(mx.cpu) else 1024
    batches = [starts[i : i + batch] for i in range(0, len(starts), batch)]
    rows = []
    total = sum(len(b) * (WINDOW - len(b[0])) for b in batches)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="generating text", leave=False) as bar:
        for b in batches:
            rows += list(continue_greedily(backbone, b, WINDOW, bar.update))
    return rows
