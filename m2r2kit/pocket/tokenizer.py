"""From documents to training data: a tokenizer, one array of token ids per kind, and random windows."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..common import UserError, whole, write_whole
from ..text.corpus import ASSISTANT, EOS, KINDS, USER, Document

# Share of the training windows per kind. By size arithmetic would get .18, but it is the hardest kind.
SHARES = {"code": 0.4, "arithmetic": 0.3, "shell": 0.3}
SAMPLE = 3_500_000  # characters of each kind to train the tokenizer on: all kinds weigh the same


def train_tokenizer(texts: list[str], vocabulary: int = 4096) -> Tokenizer:
    """Train a byte-level BPE in which each digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sample(documents: list[Document], characters: int = SAMPLE, seed: int = 1) -> list[str]:
    """Texts to train the tokenizer on: random documents, about `characters` of each kind."""
    order = random.Random(seed)
    texts = []
    for kind in KINDS:
        of_kind = [d.text for d in documents if d.kind == kind]
        order.shuffle(of_kind)
        size = 0
        for text in of_kind:
            texts.append(text)
            size += len(text)
            if size > characters:
                break
    return texts


def encode(tokenizer: Tokenizer, documents: list[Document], seed: int = 0) -> dict[str, np.ndarray]:
    """Token ids of the shuffled documents, each followed by end-of-text: kind -> int32 (tokens,)."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    rows: dict[str, list[int]] = {kind: [] for kind in KINDS}
    encodings = tokenizer.encode_batch([d.text + EOS for d in order])
    for document, encoding in zip(order, encodings, strict=True):
        rows[document.kind] += encoding.ids
    return {kind: np.array(ids, dtype=np.int32) for kind, ids in rows.items()}


def prepare(
    folder: Path,
    documents: Callable[[], list[Document]],
    vocabulary: int = 4096,
    known: Path | None = None,
) -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """The tokenizer and training tokens of a run, created once and stored in its folder.

    A resumed run must read the same tokens even if the corpus has changed, so `documents` is called only if
    the folder has none.

    Args:
        documents: returns the corpus; held-out documents are left out.
        known: a tokenizer file to use; by default the tokenizer is trained on the documents.

    Raises:
        UserError: the folder cannot be written, or its files are damaged.
    """
    tokenizer_file, tokens_file = folder / "tokenizer.json", folder / "tokens.npz"
    try:
        if not (tokenizer_file.exists() and tokens_file.exists()):
            seen = [d for d in documents() if not d.held_out]
            if known is None:
                tokenizer = train_tokenizer(sample(seen), vocabulary)
            else:
                tokenizer = Tokenizer.from_str(known.read_text())
            tokens = encode(tokenizer, seen)
            with whole(tokens_file) as new:
                np.savez(new, **tokens)
            write_whole(tokenizer_file, tokenizer.to_str())
        return Tokenizer.from_file(str(tokenizer_file)), dict(np.load(tokens_file))
    except OSError as error:
        raise UserError(
            f"the run's tokens cannot be stored in {folder} ({error.strerror or error})"
        ) from None
    except Exception as error:  # tokenizers and NumPy raise different errors for damaged files
        if isinstance(error, UserError):
            raise
        raise UserError(f"{tokenizer_file} or tokens.npz is damaged; delete both and start again") from None


class Batches:
    """Random windows of the corpus, determined by seed and step, so that a run can resume.

    Args:
        tokens: kind -> token ids (tokens,).
        shares: share of the windows per kind; kinds without tokens get none.
    """

    def __init__(self, tokens: dict[str, np.ndarray], shares: dict[str, float] = SHARES, seed: int = 0):
        self.tokens, self.seed = tokens, seed
        self.kinds = [k for k in KINDS if len(tokens.get(k, ()))]
        share = np.array([shares[k] for k in self.kinds], dtype=np.float64)
        self.shares = share / share.sum()

    def __call__(self, step: int, rows: int, length: int) -> np.ndarray:
        """The windows of a step: int32 (rows, length).

        Raises:
            UserError: a kind has fewer tokens than a window.
        """
        random_ = np.random.default_rng((self.seed, step))
        # a nearly fixed number of windows per kind in every batch: less noise than sampling kinds
        edges = np.floor(np.cumsum(self.shares) * rows + random_.random()).astype(int)
        counts = np.diff(np.concatenate([[0], np.minimum(edges, rows)]))
        counts[-1] += rows - counts.sum()
        windows = []
        for kind, count in zip(self.kinds, counts, strict=True):
            ids = self.tokens[kind]
            if len(ids) < length:
                raise UserError(
                    f"the {kind} text has {len(ids)} tokens, and a window needs {length}; add text"
                )
            starts = random_.integers(0, max(1, len(ids) - length), count)
            windows += [ids[s : s + length] for s in starts]
        return np.stack(windows)
