"""Converts a GGUF file to a Hugging Face model folder that mlx-lm loads.

MLX reads the file and converts its quantised weights (Q4_0, Q4_1, Q8_0) without loss to its affine format in
groups of 32. This module converts names, the order of rotary pairs, the tokenizer and the settings, from the
file's metadata.

In query and key matrices llama.cpp interleaves the two halves of each head's rotary pairs; Hugging Face
stores one half after the other. Without reordering the model generates noise.
"""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

from ..common import UserError

SUPPORTED = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}  # tensor types, by number (ggml.h)
GROUP = 32  # weights that share a scale, in all three quantised types
NAMES = {  # a block's tensors
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {  # pre-tokenizers by `tokenizer.ggml.pre`: (split digits one by one, pattern)
    "smollm": (True, GPT2),
    "gpt-2": (False, GPT2),
    "default": (False, GPT2),
    "llama-bpe": (False, LLAMA3),
    "llama3": (False, LLAMA3),
    "qwen2": (False, LLAMA3.replace("{1,3}", "")),
}
CONTROL, USER_DEFINED = 3, 4  # token types that are never split


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file into an existing, empty folder.

    Raises:
        UserError: the file is not GGUF or is cut short, or its family, tensor types, tokenizer or rotary
            scaling are not supported.
        OSError: the folder cannot be written.
    """
    check_types(gguf)
    try:
        tensors, facts = mx.load(str(gguf), format="gguf", return_metadata=True)
        facts = {key: plain(value) for key, value in facts.items()}
        config = hf_settings(facts, tensors)
        weights = rename(tensors, config)
        mx.eval(weights)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{gguf} cannot be read as GGUF ({error}); download it again.") from error
    tokenizer(facts).save(str(folder / "tokenizer.json"))
    # safetensors sorts the tensors, so the file and its hash are the same on every system
    arrays = {name: np.array(x) for name, x in weights.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "mlx"})
    ends = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos")}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", ends),
        ("tokenizer_config.json", tokenizer_settings(facts, config)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plain(value):
    """A metadata value as a Python object."""
    return value.tolist() if isinstance(value, mx.array) else value


# --- the file's header ----------------------------------------------------------------------

# Bytes of a metadata value by type; 8 is a string, 9 an array (gguf.md in ggml).
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_types(gguf: Path) -> None:
    """Refuse a file with tensor types that MLX would round: it reads them as float16.

    Raises:
        UserError: the file has such a type, cannot be read, or is not GGUF.
    """
    try:
        with gguf.open("rb") as file:
            types = tensor_types(file)
    except OSError as error:
        raise UserError(f"{gguf} cannot be read ({error.strerror}); give the path of a GGUF file.") from error
    except (struct.error, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(f"{gguf} is not a GGUF file, or cut short; download it again.") from error
    if unknown := sorted({t for t in types if t not in SUPPORTED}):
        raise UserError(
            f"{gguf} has tensors of GGML type {', '.join(map(str, unknown))}; use a file with types "
            f"{', '.join(SUPPORTED.values())} instead."
        )


def tensor_types(file) -> list[int]:
    """The type of each tensor, from the header of a GGUF file (version 2 or 3)."""

    def number(form: str) -> int:
        return struct.unpack("<" + form, file.read(struct.calcsize(form)))[0]

    def skip(kind: int) -> None:
        if kind == 8:
            file.seek(number("Q"), 1)
        elif kind == 9:
            of, count = number("I"), number("Q")
            if of in SIZES:
                file.seek(SIZES[of] * count, 1)
            else:
                for _ in range(count):
                    skip(of)
        else:
            file.seek(SIZES[kind], 1)

    if file.read(4) != b"GGUF" or number("I") not in (2, 3):
        raise KeyError("magic")
    tensors, values = number("Q"), number("Q")
    for _ in range(values):
        skip(8)  # its key
        skip(number("I"))
    types = []
    for _ in range(tensors):
        skip(8)  # its name
        file.seek(8 * number("I"), 1)  # its shape
        types.append(number("I"))
        file.seek(8, 1)  # its offset
    return types


# --- weights and settings -------------------------------------------------------------------


def hf_settings(facts: dict, tensors: dict[str, mx.array]) -> dict:
    """config.json of the model.

    Args:
        facts: the file's metadata.

    Raises:
        UserError: the family is not llama, rotary positions are scaled, or metadata is missing.
    """
    family = facts.get("general.architecture")
    if family != "llama":
        raise UserError(f"GGUF models of family '{family}' are not supported, only those of family llama.")
    if "rope_freqs.weight" in tensors or facts.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(
            "This GGUF model scales its rotary positions, which is not supported; use the original model."
        )

    def fact(name: str, default=None):
        value = facts.get(f"llama.{name}", default)
        if value is None:
            raise UserError(f"The GGUF file lacks llama.{name}; download it again.")
        return value

    width, heads = fact("embedding_length"), fact("attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fact("attention.head_count_kv", heads),
        "head_dim": facts.get("llama.attention.key_length", width // heads),
        "max_position_embeddings": fact("context_length"),
        "rms_norm_eps": round(fact("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": fact("rope.freq_base", 10000.0),
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
    }
    bits = {
        new_name(name): 32 * tensors[f"{name}.weight"].shape[-1] // (GROUP * scales.shape[-1])
        for name, scales in ((key.removesuffix(".scales"), x) for key, x in tensors.items())
        if f"{name}.scales" in tensors
    }
    if bits:
        common = max(set(bits.values()), key=list(bits.values()).count)
        quantization: dict = {"group_size": GROUP, "bits": common, "mode": "affine"}
        quantization |= {
            name: {"group_size": GROUP, "bits": b} for name, b in sorted(bits.items()) if b != common
        }
        config["quantization"] = quantization
    return config


def new_name(name: str) -> str:
    """The Hugging Face name of a module, from its GGUF tensor name."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    kind, number, part = (*name.split(".", 2), "", "")[:3]
    if kind != "blk" or part not in NAMES:
        raise UserError(f"The GGUF file has a tensor {name}, which a llama model does not have.")
    return f"model.layers.{number}.{NAMES[part]}"


def rename(tensors: dict[str, mx.array], config: dict) -> dict[str, mx.array]:
    """The tensors with their Hugging Face names, and query and key rows in Hugging Face's order."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    weights = {}
    for key, x in tensors.items():
        name, _, what = key.rpartition(".")  # weight, scales or biases
        module = new_name(name)
        count = heads.get(module.rpartition(".")[2])
        if count:
            x = apart(x, count)
        weights[f"{module}.{what}"] = halved(x)
    return weights


def halved(x: mx.array) -> mx.array:
    """Float32 values as float16 where it holds them exactly; anything else as it is."""
    half = x.astype(mx.float16)
    return half if x.dtype == mx.float32 and mx.array_equal(half.astype(mx.float32), x) else x


def apart(x: mx.array, heads: int) -> mx.array:
    """Rows (heads * d, ..): in each head, the interleaved rotary halves are put one after the other."""
    rows = x.reshape(heads, -1, 2, *x.shape[1:])
    return mx.contiguous(rows.swapaxes(1, 2).reshape(x.shape))


# --- text -----------------------------------------------------------------------------------


def tokenizer(facts: dict):
    """The file's byte-level BPE as a `tokenizers.Tokenizer`.

    Raises:
        UserError: the tokenizer is of another kind.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    kind, pre = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in SPLITS:
        raise UserError(
            f"The tokenizer of this GGUF file is of kind {kind}/{pre}; only byte-level BPE of kinds "
            f"{', '.join(SPLITS)} is supported."
        )
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, pattern = SPLITS[pre]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    types = facts["tokenizer.ggml.token_type"]
    whole = [(t, k) for t, k in zip(tokens, types, strict=True) if k in (CONTROL, USER_DEFINED)]
    made.add_tokens([AddedToken(t, special=k == CONTROL, normalized=False) for t, k in whole])
    return made


def tokenizer_settings(facts: dict, config: dict) -> dict:
    """tokenizer_config.json: special tokens and the chat template."""
    tokens = facts["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {new: facts.get(f"tokenizer.ggml.{old}_token_id") for old, new in names.items()}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    template = facts.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": bool(facts.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **({"chat_template": template} if template else {}),
    }
