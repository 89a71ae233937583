"""A view of an mlx-lm language model: embedding, single blocks, final norm and head.

The model itself is never changed. All methods of the kit use this view, so they work with every model of
the families in `families.py`.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..common import UserError, in_short
from .cache import FEW, FixedKV, Traced, chunks, is_fixed, round_up
from .config import window
from .cpu import threads
from .families import FAMILIES, check_supported
from .load import load
from .mlxlm import KVCache, create_attention_mask
from .objects import object_config, object_sha256
from .view import follow, private


class TooLong(UserError):
    """The prompt fills the model's context."""


class Backbone:
    """An mlx-lm model as `embed -> blocks -> head`.

    Shapes: B sequences, T tokens, D width, V vocabulary, N blocks.
    Create one with `Backbone.load(folder_or_repo)` or `Backbone.of(model, tokenizer)`.

    Args:
        config: the model's config.json.
        sha256: hash of the weights, or a function that computes it on first use.

    Raises:
        UserError: the model's family is not supported.
    """

    def __init__(self, model: nn.Module, tokenizer, config: dict, sha256: str | Callable[[], str]):
        check_supported(config)
        threads.prepare()
        self.family = config["model_type"]
        self.model, self.tokenizer, self.config, self._sha256 = model, tokenizer, config, sha256
        self.parts = FAMILIES[self.family].parts
        self._view = private(model)
        self.blocks: list[nn.Module] = list(self._view.layers)
        self._traced: dict[tuple, Traced] = {}  # compiled passes, by kind and blocks
        self._kv_shapes: list | None = None  # (shape, dtype) of keys and values of each block

    @classmethod
    def load(
        cls,
        path_or_repo: str | Path,
        dtype: mx.Dtype | None = None,
        take_out: Callable | None = None,
        sha256: Callable | None = None,
        decode: bool | None = None,
        adapter: str | Path | None = None,
    ) -> "Backbone":
        """Load a Hugging Face folder or repository; arguments and errors as in `load.load`."""
        return cls(*load(path_or_repo, dtype, take_out, sha256, decode, adapter))

    @classmethod
    def of(cls, model: nn.Module, tokenizer) -> "Backbone":
        """The view of a model and a tokenizer that `mlx_lm.load` returned; neither is changed.

        The hash is computed on first use (`objects.object_sha256`). For an unchanged model it is the hash of
        the folder that it was loaded from.

        Raises:
            UserError: the model's family is not supported.
        """
        view = cls(model, None, object_config(model, None), "")
        view.name(tokenizer)
        return view

    def name(self, tokenizer) -> None:
        """Set the tokenizer of a model object, and the config and hash of the folder it was loaded from."""
        self.tokenizer, self.config = tokenizer, object_config(self.model, tokenizer)
        self._sha256 = lambda: object_sha256(self.model, tokenizer)
        self.__dict__.pop("sha256", None)

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights; trained modules record it."""
        return self._sha256() if callable(self._sha256) else self._sha256

    def refresh(self) -> None:
        """Update the view after the model's weights have changed; `new_cache` calls this."""
        if follow(self._view, self.model):
            self._traced.clear()  # weights are constants of a compiled pass
            self.__dict__.pop("sha256", None)  # a model object's hash is computed again

    # --- sizes ---

    @property
    def depth(self) -> int:
        """N, the number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.config["hidden_size"]

    @property
    def context(self) -> int:
        """The most positions (prompt and answer): the model's context length, or its attention window if
        that is shorter."""
        longest = self.config.get("max_position_embeddings") or 1 << 30
        return min(longest, window(self.config) or longest)

    @property
    def is_moe(self) -> bool:
        """Whether the model is a mixture of experts."""
        return FAMILIES[self.family].moe

    @cached_property
    def matrix_bytes(self) -> int:
        """Bytes of the largest weight matrix in the blocks (one expert's, for a mixture)."""
        weights = (w for _, w in tree_flatten([block.parameters() for block in self.blocks]) if w.ndim > 1)
        return max((w.nbytes // math.prod(w.shape[:-2]) for w in weights), default=0)

    # --- the forward pass, in pieces ---

    def embed(self, tokens: mx.array) -> mx.array:
        """h_0, the input of the first block: (B, T) token ids -> (B, T, D)."""
        h = self._view.model.embed_tokens(tokens)
        return h * (self.width**0.5) if self.family in ("gemma", "gemma2") else h

    def run(
        self, h: mx.array, cache: list | None = None, start: int = 0, stop: int | None = None
    ) -> mx.array:
        """Blocks start..stop-1: h_start -> h_stop, (B, T, D) -> (B, T, D).

        `cache` has one layer cache a block and grows by T positions in the blocks that run. With a
        cache of fixed size (`new_cache`) a pass of few positions is compiled; one of many is
        computed in chunks, so that memory for attention grows with T and not with its square.
        """
        stop = self.depth if stop is None else stop
        if start == stop:
            return h
        if is_fixed(cache, start) and h.shape[1] <= FEW:
            return self._pass("run", start, stop)(cache, h)
        parts = [h] if cache is None else chunks(h)
        if len(parts) == 1:
            return self._run(h, cache, start, stop)
        for i, part in enumerate(parts):
            parts[i] = self._run(part, cache, start, stop)
            mx.eval(parts[i], [(c.keys, c.values) for c in cache[start:stop]])
        return mx.concatenate(parts, axis=1)

    def _run(self, h, cache, start, stop):
        cache = [None] * self.depth if cache is None else cache
        mask = self.mask(h, cache[start])
        for block, c in zip(self.blocks[start:stop], cache[start:stop], strict=True):
            h = block(h, mask, cache=c)
        return h

    def mask(self, h: mx.array, cache=None):
        """The causal mask for h (B, T, D) after the positions in a layer cache, in the blocks' format."""
        return create_attention_mask(h, cache, return_array=self.family == "gemma2")

    def _pass(self, kind: str, start: int, stop: int) -> Traced:
        """A compiled pass through blocks start..stop-1.

        | kind | input | output |
        |---|---|---|
        | run | states | states |
        | logits | tokens | logits |
        | read | tokens | states, logits |
        | finish | states | logits |
        | close | states | states, logits |
        """
        if (kind, start, stop) not in self._traced:

            def body(cache, x):
                h = self._run(self.embed(x) if kind in ("logits", "read") else x, cache, start, stop)
                if kind == "run":
                    return h
                return (h, self.head(h)) if kind in ("read", "close") else self.head(h)

            self._traced[kind, start, stop] = Traced(body, self.depth, range(start, stop))
        return self._traced[kind, start, stop]

    def states(self, tokens: mx.array, cache: list | None = None) -> list[mx.array]:
        """All residual states [h_0, .., h_N] of tokens (B, T); each (B, T, D)."""
        states = [self.embed(tokens)]
        for l in range(self.depth):
            states.append(self.run(states[-1], cache, l, l + 1))
        return states

    def norm(self, h: mx.array) -> mx.array:
        """The final norm (nu in the notebooks): (.., D) -> (.., D)."""
        return self._view.model.norm(h)

    def head(self, h: mx.array) -> mx.array:
        """Logits of a residual state, final norm included: (.., D) -> (.., V)."""
        return self.unembed(self.norm(h))

    def unembed(self, x: mx.array) -> mx.array:
        """The head (H in the notebooks), for a state after the final norm: (.., D) -> (.., V)."""
        if "lm_head" in self._view:
            return self._view.lm_head(x)
        logits = self._view.model.embed_tokens.as_linear(x)
        if self.family == "gemma2":
            cap = self.model.final_logit_softcapping
            logits = mx.tanh(logits / cap) * cap
        return logits

    def logits(self, tokens: mx.array, cache: list | None = None) -> mx.array:
        """The model's logits: (B, T) token ids -> (B, T, V)."""
        if is_fixed(cache, 0) and tokens.shape[1] <= FEW:
            return self._pass("logits", 0, self.depth)(cache, tokens)
        return self.head(self.run(self.embed(tokens), cache))

    def finish(self, h: mx.array, cache: list, start: int) -> mx.array:
        """Blocks start..N-1 and the head: h_start (B, T, D) -> logits (B, T, V)."""
        if is_fixed(cache, start) and h.shape[1] <= FEW:
            return self._pass("finish", start, self.depth)(cache, h)
        return self.head(self.run(h, cache, start))

    def close(self, h: mx.array, cache: list, start: int) -> tuple[mx.array, mx.array]:
        """`finish` that also returns the states: h_start (B, T, D) -> h_N (B, T, D), logits (B, T, V)."""
        if is_fixed(cache, start) and h.shape[1] <= FEW:
            return self._pass("close", start, self.depth)(cache, h)
        h = self.run(h, cache, start)
        return h, self.head(h)

    def read(self, tokens: mx.array, cache: list, exit: int) -> tuple[mx.array, mx.array]:
        """The state at an exit E and its logits (the logit lens):
        tokens (B, T) -> h_E (B, T, D), logits (B, T, V)."""
        if is_fixed(cache, 0) and tokens.shape[1] <= FEW:
            return self._pass("read", 0, exit)(cache, tokens)
        h = self.run(self.embed(tokens), cache, 0, exit)
        return h, self.head(h)

    def new_cache(self, capacity: int | None = None, batch: int = 1) -> list:
        """An empty KV cache: one layer cache for each block.

        Args:
            capacity: positions to allocate; the cache grows when needed. Passes of few positions are then
                compiled. None, or a model whose positions cannot be compiled, gives mlx-lm's own cache.
            batch: number of sequences, all of one length.
        """
        self.refresh()
        cache: list = [KVCache() for _ in self.blocks]  # with an attention window too: `context` ends there
        ropes = {type(getattr(block[self.parts.attention], "rope", None)).__name__ for block in self.blocks}
        if capacity is None or "DynamicNTKScalingRoPE" in ropes:  # its angles depend on the text's length
            return cache
        if self._kv_shapes is None:  # found by a pass, because they differ between families
            self.run(self.embed(mx.array([[0]])), cache)
            self._kv_shapes = [[(x.shape, x.dtype) for x in c.keys_and_values()] for c in cache]
        return [
            FixedKV(
                *(
                    mx.zeros((batch, heads, round_up(capacity), width), dtype)
                    for (_, heads, _, width), dtype in shapes
                )
            )
            for shapes in self._kv_shapes
        ]

    # --- text ---

    @property
    def eos(self) -> set[int]:
        """End-of-text token ids."""
        return set(self.tokenizer.eos_token_ids)

    def encode(
        self, text: str, chat: bool = True, before: Sequence[str] = (), system: str | None = None
    ) -> list[int]:
        """Token ids of a prompt, as a user's turn if the model has a chat template.

        Args:
            chat: whether to use the chat template; without it the text is continued as it is.
            before: earlier messages of the user and the model, alternating.
            system: a system prompt.

        Raises:
            UserError: the prompt is empty, not valid Unicode or too long, or a chat template is needed and
                missing, or it fails.
        """
        if not text.strip():
            raise UserError("The prompt is empty; give a text to continue.")
        chat = chat and self.tokenizer.has_chat_template
        if (before or system) and not chat:
            what = "A conversation" if before else "A system prompt"
            raise UserError(f"{what} needs a chat template, which is missing or not used.")
        if chat:
            messages = [*before, text.strip()]
            turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(messages)]
            return self.encode_turns([*([{"role": "system", "content": system}] if system else []), *turns])
        check_unicode(text)
        begin = self.tokenizer.bos_token  # added only once, as in mlx-lm
        ids = list(self.tokenizer.encode(text, add_special_tokens=not begin or not text.startswith(begin)))
        self.max_new_tokens(ids)
        return ids

    def encode_turns(self, turns: Sequence[dict]) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to the start of the next answer.

        Args:
            turns: dicts of `role` (system, user or assistant) and `content`.

        Raises:
            UserError: the chat template is missing or fails, a turn lacks its role or content, or the
                conversation is not valid Unicode or too long.
        """
        if not self.tokenizer.has_chat_template:
            raise UserError("A conversation needs a chat template, which this tokenizer does not have.")
        for turn in turns:
            if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
                raise UserError("A turn of the conversation is not a dict of role and content; give both.")
            if isinstance(turn["content"], str):  # some templates also take a list of parts
                check_unicode(turn["content"])
        try:
            ids = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author, which may raise anything
            raise UserError(
                f"The model's chat template fails ({in_short(error)}); prompt without it (--raw)."
            ) from error
        ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
        self.max_new_tokens(ids)
        return ids

    def max_new_tokens(self, prompt: list[int]) -> int:
        """The number of tokens that the context has left after a prompt of token ids.

        Raises:
            UserError: the prompt is empty, or fills the context.
        """
        if not prompt:
            raise UserError("The prompt is empty; give a text to continue.")
        if len(prompt) >= self.context:
            raise TooLong(
                f"The prompt has {len(prompt)} tokens and the model's context is {self.context}; shorten it."
            )
        return self.context - len(prompt)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without end-of-text tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self.eos])


def check_unicode(text: str) -> None:
    """Refuse text with lone surrogates, such as Python makes of bytes that are not UTF-8.

    Raises:
        UserError: the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The prompt is not valid Unicode at character {error.start + 1}; write it in UTF-8."
        ) from None


def crop(cache: list, length: int) -> None:
    """Cut every layer cache back to `length` positions; shorter ones stay."""
    for c in cache:
        c.trim(max(0, c.offset - length))
