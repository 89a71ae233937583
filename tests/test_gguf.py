"""GGUF files that the tests write themselves become folders that compute the same."""

import struct

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.gguf import NAMES, OUTSIDE, apart, convert

HEADS = {"q_proj": 4, "k_proj": 2}
F32, F16, Q4_0, Q4_1, Q8_0, Q6_K = 0, 1, 2, 3, 8, 14


def facts(**changes) -> dict:
    letters = ["<eos>", "<user>", *[chr(33 + i) for i in range(93)], "Ġ"]
    pairs = ["a b", "ab c"]
    tokens = [*letters, "ab", "abc"][:98]
    return {
        "general.architecture": "llama",
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": pairs,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        **changes,
    }


def value(x) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(x, str):
        return struct.pack("<IQ", 8, len(x.encode())) + x.encode()
    if isinstance(x, list):
        kind = 8 if isinstance(x[0], str) else 5
        items = [value(i)[4:] if kind == 8 else struct.pack("<i", i) for i in x]
        return struct.pack("<IIQ", 9, kind, len(x)) + b"".join(items)
    return struct.pack("<If", 6, x) if isinstance(x, float) else struct.pack("<II", 4, x)


def packed(w: np.ndarray, kind: int) -> tuple[bytes, np.ndarray]:
    """A matrix in the blocks of a type, 32 weights each, and what these blocks stand for."""
    if kind == F32:
        return w.astype("<f4").tobytes(), w
    if kind == F16:
        return w.astype("<f2").tobytes(), w.astype(np.float16).astype(np.float32)
    groups = w.reshape(-1, 32)
    out, rebuilt = b"", []
    for g in groups:
        if kind == Q8_0:
            d = np.float16(np.abs(g).max() / 127)
            q = np.clip(np.round(g / np.float32(d)), -127, 127).astype(np.int8)
            out += d.tobytes() + q.tobytes()
            rebuilt.append(q * np.float32(d))
            continue
        if kind == Q4_1:
            d, m = np.float16((g.max() - g.min()) / 15), np.float16(g.min())
        else:
            d = np.float16(np.abs(g).max() / 7)
            m = np.float16(-8 * d)
        q = np.clip(np.round((g - np.float32(m)) / np.float32(d)), 0, 15).astype(np.uint8)
        out += d.tobytes() + (m.tobytes() if kind == Q4_1 else b"") + (q[:16] | q[16:] << 4).tobytes()
        rebuilt.append(q * np.float32(d) + np.float32(m))
    return out, np.array(rebuilt, np.float32).reshape(w.shape)


def together(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores them: the halves of each head interleaved."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path, kind: int = F32, metadata: dict | None = None, tensor_type: int | None = None) -> dict:
    """A GGUF file of a small llama; returns its true weights by their Hugging Face names."""
    metadata = facts() if metadata is None else metadata
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(metadata["tokenizer.ggml.tokens"]), 32), "output_norm": (32,)}
    for l in range(2):
        shapes |= {f"blk.{l}.attn_norm": (32,), f"blk.{l}.ffn_norm": (32,)}
        shapes |= {f"blk.{l}.attn_q": (32, 32), f"blk.{l}.attn_output": (32, 32)}
        shapes |= {f"blk.{l}.attn_k": (16, 32), f"blk.{l}.attn_v": (16, 32)}
        shapes |= {f"blk.{l}.ffn_gate": (64, 32), f"blk.{l}.ffn_up": (64, 32), f"blk.{l}.ffn_down": (32, 64)}
    header, body, true = b"", b"", {}
    for name, shape in shapes.items():
        w = (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        of = F32 if len(shape) == 1 else kind
        part = name.rpartition(".")[2]
        new = OUTSIDE.get(name) or f"model.layers.{name.split('.')[1]}.{NAMES[part]}"
        heads = HEADS.get(new.rpartition(".")[2])
        data, rebuilt = packed(together(w, heads) if heads else w, of)
        true[f"{new}.weight"] = np.array(apart(mx.array(rebuilt), heads)) if heads else rebuilt
        key = f"{name}.weight".encode()
        header += struct.pack("<Q", len(key)) + key + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", of if tensor_type is None else tensor_type, len(body))
        body += data + b"\0" * (-len(data) % 32)
    values = b"".join(struct.pack("<Q", len(key)) + key.encode() + value(x) for key, x in metadata.items())
    start = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata)) + values + header
    path.write_bytes(start + b"\0" * (-len(start) % 32) + body)
    return true


def converted(tmp_path, **options):
    write(tmp_path / "m.gguf", **options)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("kind", [F32, F16, Q4_0, Q4_1, Q8_0], ids=["f32", "f16", "q4_0", "q4_1", "q8_0"])
def test_the_folder_holds_the_weights_of_the_file(tmp_path, kind):
    true = write(tmp_path / "m.gguf", kind)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    backbone = Backbone.load(tmp_path / "out")
    found = {k: np.array(v.astype(mx.float32)) for k, v in tree_flatten(backbone.model.parameters())}
    assert found.keys() == true.keys()
    for name, w in true.items():
        assert np.allclose(found[name], w, rtol=1e-6, atol=2e-6), name


def test_rotary_halves_go_back_to_their_places():
    w = np.arange(8 * 3).reshape(8, 3).astype(np.float32)
    assert not np.array_equal(together(w, 2), w)
    assert np.array_equal(np.array(apart(mx.array(together(w, 2)), 2)), w)


def test_the_text_is_that_of_the_same_model_as_a_folder(tmp_path):
    true = write(tmp_path / "m.gguf", F16)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 98}
    same = tiny.make_folder("llama", tmp_path / "same", **config, tie_word_embeddings=True)
    mx.save_safetensors(
        str(same / "model.safetensors"), {k: mx.array(v) for k, v in true.items()}, metadata={"format": "mlx"}
    )
    tokens = mx.array([[5, 17, 40, 3, 60, 22, 9]])
    a, b = (Backbone.load(f).logits(tokens) for f in (tmp_path / "out", same))
    assert mx.allclose(a, b, atol=1e-2) and mx.array_equal(a.argmax(-1), b.argmax(-1))


def test_the_tokenizer_merges_splits_digits_and_keeps_marks_whole(tmp_path):
    backbone = Backbone.load(converted(tmp_path))
    tokens = facts()["tokenizer.ggml.tokens"]
    ids = backbone.encode("abc 12<user>ab", chat=False)
    assert [tokens[i] for i in ids] == ["abc", "Ġ", "1", "2", "<user>", "ab"]
    assert backbone.tokenizer.decode(ids) == "abc 12<user>ab" and backbone.eos == {0}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"general.architecture": "falcon"}, "family 'falcon'"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary positions"),
        ({"tokenizer.ggml.model": "llama"}, "kind llama/smollm"),
        ({"tokenizer.ggml.pre": "tekken"}, "kind gpt2/tekken"),
    ],
)
def test_other_models_are_refused_in_a_sentence(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        converted(tmp_path, metadata=facts(**change))


def test_other_tensor_types_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"GGML type 14; use a file with types F32, F16, Q4_0, Q4_1, Q8_0"):
        converted(tmp_path, tensor_type=Q6_K)


@pytest.mark.parametrize("keep", [0, 3, 30, 300, 3000])
def test_a_file_that_was_cut_short_is_named(tmp_path, keep):
    write(tmp_path / "m.gguf", Q4_1)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:keep])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
