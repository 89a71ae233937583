"""Streamed text: the segments add up to the tokenizer's own decoding, for any tokens."""

import numpy as np
import pytest
import tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from m2r2kit.common import UserError
from m2r2kit.driver import Generation, generate, stream
from m2r2kit.speculation import EarlyExit, Speculation
from m2r2kit.text.streaming import CONTEXT, WINDOW, Detokenizer, StopWords

TEXT = "One, two … 🤖👩‍👩‍👧 naïve – 日本語.\n\n  Next line, isn't it? ' s . ! \ufffd x"

FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def byte_level(**settings):
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=made, **settings))


def sentence_piece(strip=True):
    """As Llama 2 has it: words with their space before them, and bytes for what it does not know."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["<unk>", *bytes_, "▁", "▁One", ",", "▁two", "▁", "▁na", "ve", "é", "▁▁", ".", "x", "ï"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=made))


TOKENIZERS = {
    "byte-level": byte_level(),
    "cleaning refused": byte_level(clean_up_tokenization_spaces=True),
    "spaces cleaned": byte_level(clean_up_tokenization_spaces=True, **{FORCED: True}),
    "SentencePiece": sentence_piece(),
    "SentencePiece, space kept": sentence_piece(strip=False),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def segments(tokenizer, ids, eos=()):
    detokenizer = Detokenizer(tokenizer, eos)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


@each_tokenizer
def test_segments_add_up_to_the_whole_text(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    found = segments(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids) and sum(map(bool, found)) > 5
    for n in range(len(ids)):  # a text may end inside a character
        assert "".join(segments(tokenizer, ids[:n])) == tokenizer.decode(ids[:n])


@each_tokenizer
def test_any_tokens_in_any_order(tokenizer):
    """Most of them are not valid text; some have no piece, as in a padded vocabulary."""
    assert tokenizer.decode([len(tokenizer) + 5]) == ""
    for seed in range(40):
        random = np.random.default_rng(seed)
        usual = tokenizer.encode(TEXT, add_special_tokens=False)
        ids = np.where(
            random.random(4 * WINDOW) < 0.5,
            random.choice(usual, 4 * WINDOW),
            random.integers(0, len(tokenizer) + 9, 4 * WINDOW),
        ).tolist()
        assert "".join(segments(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_long_text_is_decoded_in_windows():
    tokenizer, longest = byte_level(), 0

    class Watched:
        clean_up_tokenization_spaces = False
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids)

    ids = tokenizer.encode(20 * TEXT, add_special_tokens=False)
    assert "".join(segments(Watched(), ids)) == 20 * TEXT
    assert CONTEXT < longest < WINDOW + 16


def test_a_character_comes_when_it_is_whole():
    tokenizer = byte_level()
    found = segments(tokenizer, tokenizer.encode("a🤖b", add_special_tokens=False))
    assert found == ["a", "", "", "", "🤖", "b", ""]
    refused = segments(TOKENIZERS["cleaning refused"], tokenizer.encode("a b", add_special_tokens=False))
    assert refused == ["a", " ", "b", ""]  # nothing is held back for a cleaning that does not come
    found = segments(sentence_piece(), [sentence_piece().convert_tokens_to_ids(t) for t in ("▁One", "▁two")])
    assert found == ["One", " two", ""]


def test_the_end_of_text_has_no_text():
    tokenizer = byte_level()
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    assert segments(tokenizer, [a, b], eos={b}) == ["a", "", ""]


# --- stop words ---------------------------------------------------------------------------


def cut(words, parts):
    stop, found = StopWords(words), []
    for i, part in enumerate(parts):
        text, ended = stop.take(part, i == len(parts) - 1)
        found.append(text)
        if ended:
            return found, True
    return found, False


def test_a_text_is_cut_before_a_stop_word():
    assert cut(["END"], ["abE", "N", "Dx"]) == (["ab", "", ""], True)
    assert cut(["END"], ["abE", "NTE", "EN"]) == (["ab", "ENT", "EEN"], False)
    assert cut(["aab"], ["aa", "ab"]) == (["", "a"], True)
    assert cut(["long word", "wo"], ["a long ", "word"]) == (["a ", "long word"[:0]], True)
    assert cut([], ["ab", ""]) == (["ab", ""], False)
    for size in (1, 2, 3, 7):
        text = "one\n\ntwo END three"
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        found, ended = cut(["END", "zero"], parts)
        assert ended and "".join(found) == "one\n\ntwo "
    with pytest.raises(UserError, match="empty"):
        StopWords(["a", ""])


# --- the driver's stream --------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [0, 4])
def test_streamed_text_is_that_of_the_tokens(drafts):
    view, prompt = tiny.backbone(), tiny.prompt(6)
    decoder, out = Speculation(view, EarlyExit(view, 3), drafts), Generation()
    pieces = list(stream(decoder, prompt, 24, out=out))
    whole = generate(decoder, prompt, 24)
    assert [p.token for p in pieces] == whole.tokens == out.tokens
    assert [p.from_draft for p in pieces] == whole.from_draft
    assert "".join(p.text for p in pieces) == out.text == str(out) == view.decode(whole.tokens)
    assert [p.stopped for p in pieces] == [None] * (len(pieces) - 1) + [whole.stopped]


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_stop_word_ends_a_text(drafts):
    view, prompt = tiny.backbone(), tiny.prompt(6)
    decoder = Speculation(view, EarlyExit(view, 3), drafts)
    whole = generate(decoder, prompt, 24)
    text = view.decode(whole.tokens)
    for first in range(1, 10):
        word, out = text[first : first + 2], Generation()
        at = text.index(word)
        pieces = list(stream(decoder, prompt, 24, [word], out))
        assert "".join(p.text for p in pieces) == out.text == text[:at]
        assert out.tokens == whole.tokens[: at + 2] == [p.token for p in pieces]
        assert out.stopped == pieces[-1].stopped == "stop"
        assert len(out.from_draft) == len(out.tokens) and sum(out.from_draft) == sum(out.accepted)
    assert generate(decoder, prompt, 24).tokens == whole.tokens  # and another text after it
