"""The rows of text that `train` learns from and judges by, the same for all that is trained for a model."""

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
BEGINNING, LONGEST = 24, 112  # tokens of a beginning where nobody asks, of a question at most
HELD_OUT_ROWS = 96
OWN = 0.9  # share of the rows that the model writes itself
WRITTEN = 1  # changes with the way the rows are made, so that older ones are not taken for them
SMALL = 1 << 28  # numbers of a model that is trained for in float32 on any device


def for_training(model) -> Backbone:
    """The frozen model: a small one in float32, which half precision of states and logits would blur."""
    backbone = Backbone.load(model)
    if sum(w.size for _, w in tree_flatten(backbone.model.parameters())) <= SMALL:
        backbone.model.set_dtype(mx.float32)
        backbone.refresh()
    return backbone


def text(backbone: Backbone, corpus, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, and rows to judge by from documents that no training has seen.

    The model writes most of them, which takes minutes: they are kept in the cache folder for the next
    training that asks for the same.
    """
    all_documents = documents(Path(corpus) if corpus else download.corpus_folder())
    asked = [WRITTEN, backbone.sha256, rows, seed, OWN, WINDOW, HELD_OUT_ROWS]
    key = hashlib.sha256(json.dumps(asked).encode())
    for d in all_documents:
        key.update(f"{d.name}\0{d.text}\0".encode())
    file = cache_dir() / f"text-{key.hexdigest()[:16]}.npz"
    try:
        with np.load(file) as kept:
            return kept["train"], kept["held_out"]
    except Exception:  # none, cut short or damaged, for which each layer below has an error of its own
        pass
    train, held_out = write(backbone, all_documents, rows, seed)
    try:
        with whole(file) as new:
            np.savez_compressed(new, train=train, held_out=held_out)
    except UserError as error:  # the training goes on with the text; the next one generates it again
        print(f"The text for training is not kept: {error}", file=sys.stderr)
    return train, held_out


def write(backbone: Backbone, all_documents: list, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What `text` keeps."""
    train, held_out = (tokens_of(backbone, all_documents, held, rows, seed) for held in (False, True))
    train = windows(backbone, train, rows, OWN, seed)
    return train, windows(backbone, held_out, HELD_OUT_ROWS, OWN, seed + 1)


def tokens_of(
    backbone: Backbone, all_documents: list, held_out: bool, rows: int, seed: int
) -> dict[str, np.ndarray]:
    """Token ids of each kind's documents in one row, as many as `rows` rows are to be drawn from."""
    ids: dict[str, list[int]] = {kind: [] for kind in KINDS}
    budget = 40 * rows * WINDOW  # characters of a kind
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
    """Rows of text (rows, WINDOW): a share `own` written by the model, the rest from the corpus,
    the kinds in equal parts and the rows shuffled."""
    rng = np.random.default_rng(seed)
    kinds = [ids for ids in tokens.values() if len(ids) > WINDOW]
    parts = []
    for i, ids in enumerate(kinds):
        share = rows // len(kinds) + (i < rows % len(kinds))
        written = round(share * own)
        starts = rng.integers(0, len(ids) - WINDOW, share - written)
        parts += [ids[s : s + WINDOW] for s in starts]
        parts += _written(backbone, questions_or_beginnings(backbone, ids, written, rng))
    # joined with an empty text, ids would have become numbers with a point
    return np.stack(parts)[rng.permutation(len(parts))].astype(np.int32)


def questions_or_beginnings(
    backbone: Backbone, ids: np.ndarray, rows: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """What the model is to go on from: `rows` whole questions where one of its kind's documents (`ids`, in
    one row) asks any and the tokenizer knows how, else beginnings from anywhere."""
    asks, answers = (backbone.tokenizer.convert_tokens_to_ids(mark) for mark in (USER, ASSISTANT))
    known = asks != answers and {asks, answers} <= set(range(backbone.config["vocab_size"]))
    found = questions(ids, asks, answers, rows, LONGEST, rng) if known and rows else []
    return found or beginnings(ids, rows, BEGINNING, rng)


def _written(backbone: Backbone, starts: list[np.ndarray]) -> list[np.ndarray]:
    """Each beginning continued to a whole row; those of about one length at once."""
    starts = sorted(starts, key=len)
    batch = 64 if mx.default_device() == mx.Device(mx.cpu) else 1024
    batches = [starts[i : i + batch] for i in range(0, len(starts), batch)]
    rows = []
    total = sum(len(b) * (WINDOW - len(b[0])) for b in batches)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="the model writes", leave=False) as bar:
        for b in batches:
            rows += list(continue_greedily(backbone, b, WINDOW, bar.update))
    return rows
