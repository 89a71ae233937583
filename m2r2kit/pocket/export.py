"""Export a pocket model as an ordinary Hugging Face folder that mlx-lm loads, and evaluate it.

A training run keeps float32 weights and the optimizer's state; the exported folder is float16. `evaluate`
measures the folder, not the run.
"""

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer
from tqdm import tqdm

from ..common import UserError, whole
from ..model.load import decoded
from ..model.mlxlm import load_model
from ..text.corpus import ASSISTANT, EOS, KINDS, USER, Document
from .expert_tiles import TiledExperts
from .pretrain import FAMILIES, Run
from .tokenizer import encode

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}

# The turns of the corpus (`corpus.turn`); the model is trained on no other roles.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}" + USER + "{{ message.content | trim }}"
    "{% elif message.role == 'assistant' %}" + ASSISTANT + "{{ message.content | trim }}" + EOS +
    "{% else %}{{ raise_exception('this model knows only the roles user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip


def export(run: Run, tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a run's model as a Hugging Face folder, whole or not at all; replaces an earlier export.

    Args:
        run: the training run; its current weights are written as float16.
        tokenizer: as `tokenizer.train_tokenizer` returns it.
        folder: the destination. Other files of an earlier export (such as a stream) are kept.

    Raises:
        UserError: `folder` exists, is not empty and is not a model.
    """
    folder = Path(folder).resolve()
    is_model = (folder / "config.json").exists()
    if folder.exists() and not is_model and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a model; give a new folder")
    weights = {name: w.astype(mx.float16) for name, w in tree_flatten(run.parameters)}
    config = FAMILIES[run.config.type].hf_config(run.config, run.blocks) | {"torch_dtype": "float16"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": run.config.context,
        "chat_template": CHAT_TEMPLATE,
    }
    with whole(folder, replace=True) as new:
        new.mkdir()
        mx.save_safetensors(str(new / "model.safetensors"), weights, metadata={"format": "mlx"})
        (new / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
        for name, content in (
            ("config.json", config),
            ("tokenizer_config.json", settings),
            ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}),
        ):
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
        if folder.exists():
            for other in (each for each in folder.iterdir() if each.name not in FILES):
                (shutil.copytree if other.is_dir() else shutil.copy2)(other, new / other.name)
    return folder


def evaluate(folder: Path, documents: list[Document], most: int = 60_000, window: int = 256) -> dict:
    """Evaluate an exported model on held-out documents, with mlx-lm in float32.

    Args:
        documents: those that are not held out are ignored.
        most: maximum tokens per kind.
        window: tokens per sequence, as in training.

    Returns:
        kind -> `loss` (mean cross-entropy of the next token, nats), `bits_per_byte`, `accuracy` (of the most
        likely token), `tokens` (predicted). Kinds without a full window are left out. For a mixture also
        `experts` -> `share` (of each block's accesses, per expert; sums to 1) and `entropy` of these shares
        (bits, per block; log2 of the number of experts if all are used equally).
    """
    folder = Path(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = decoded(load_model(folder)[0], mx.float32)
    mixtures = [block.mlp for block in model.layers if hasattr(block.mlp, "switch_mlp")]
    for mixture in mixtures:  # ten times as fast as mlx-lm's own on a CPU
        mixture.switch_mlp = TiledExperts(mixture.switch_mlp)
    # a byte-level token has one character per byte; special tokens stand for no bytes
    specials = {EOS, USER, ASSISTANT}
    size = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, i in tokenizer.get_vocab().items():
        size[i] = 0 if token in specials else len(token)

    rows = encode(tokenizer, [d for d in documents if d.held_out])
    counts = {kind: (min(most, len(rows[kind])) - 1) // window for kind in KINDS}
    figures = {}
    with tqdm(total=sum(counts.values()) * window, unit="token", unit_scale=True, desc="held out") as bar:
        for kind, count in counts.items():
            if count < 1:
                continue
            ids = rows[kind][: count * window + 1]
            inputs, targets = ids[:-1].reshape(count, window), ids[1:].reshape(count, window)
            loss = right = 0.0
            for i in range(0, count, 8):
                logits = model(mx.array(inputs[i : i + 8]))  # (8, window, V)
                wanted = mx.array(targets[i : i + 8])
                loss += nn.losses.cross_entropy(logits, wanted, reduction="sum").item()
                right += (logits.argmax(-1) == wanted).sum().item()
                bar.update(wanted.size)
            figures[kind] = {
                "loss": loss / targets.size,
                "bits_per_byte": loss / math.log(2) / int(size[targets].sum()),
                "accuracy": right / targets.size,
                "tokens": targets.size,
            }
    if mixtures:
        share = np.array([m.switch_mlp.used / max(1, m.switch_mlp.used.sum()) for m in mixtures])
        entropy = -(share * np.log2(np.maximum(share, 1e-12))).sum(1)
        figures["experts"] = {"share": share.round(5).tolist(), "entropy": entropy.round(4).tolist()}
    return figures
