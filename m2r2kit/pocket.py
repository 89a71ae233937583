"""A pocket model as a folder: an ordinary Hugging Face `llama` that mlx-lm loads, and how good it is.

A training run keeps float32 weights and the optimizer's state; what is shipped is `export`'s
folder in float16. So `evaluate` measures the folder and not the run.
"""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from .corpus import ASSISTANT, EOS, USER
from .errors import UserError
from .pretrain import Run, hf_config

# Turns as the corpus writes them (`corpus.turn`); the model has seen no other roles.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}" + USER + "{{ message.content | trim }}"
    "{% elif message.role == 'assistant' %}" + ASSISTANT + "{{ message.content | trim }}" + EOS +
    "{% else %}{{ raise_exception('this model knows only the roles user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip


def export(run: Run, tokenizer, folder: Path) -> Path:
    """Write a run's model as a Hugging Face folder; a folder of that name is replaced.

    Args:
        run: the training run; its current weights are written as float16.
        tokenizer: `tokenizers.Tokenizer`, as `corpus.train_tokenizer` returns it.
        folder: where; it appears whole or not at all.
    """
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    weights = {name: w.astype(mx.float16) for name, w in tree_flatten(run.parameters)}
    config = hf_config(run.config, run.blocks) | {"torch_dtype": "float16"}
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
    try:
        temporary.mkdir(parents=True)
        mx.save_safetensors(str(temporary / "model.safetensors"), weights, metadata={"format": "mlx"})
        tokenizer.save(str(temporary / "tokenizer.json"))
        for name, content in (
            ("config.json", config),
            ("tokenizer_config.json", settings),
            ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}),
        ):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)  # a folder cannot be renamed onto a full one
        temporary.replace(folder)
    except (OSError, RuntimeError) as error:  # MLX reports a full disk as RuntimeError
        raise UserError(f"the model could not be written to {folder} ({error}); nothing is left of it") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
