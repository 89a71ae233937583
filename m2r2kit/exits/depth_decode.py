"""Decoding with the baselines of `depths.py`: first blocks only, or routers that let a token pass by blocks.

A router decides on the state at its block, so the pass stops there and goes on with the part that it chose:

    first part | router | block, or its keys and values only; blocks up to the next router | router | ..
"""

import mlx.core as mx

from .. import driver
from ..driver import Decoder, Emitted, Generation
from ..model.backbone import Backbone
from ..model.cache import Traced, chunks
from .depths import MixtureOfDepths, Shallow


class DepthDecoder(Decoder):
    """A model that decodes with `Shallow` or `MixtureOfDepths`, with their weights of this moment.

    Attributes:
        threshold: score from which a routed block takes a token. It may be changed between texts.
    """

    def __init__(self, backbone: Backbone, module: Shallow | MixtureOfDepths):
        self.backbone, self.module, self.threshold = backbone, module, 0.5
        mx.eval(module.parameters())
        self.blocks = [block.merged() for block in module.blocks]
        self.routed = [l for l in range(len(self.blocks)) if self._routes(l)]
        begins = [0, *self.routed]
        self.spans = list(zip(begins, [*begins[1:], len(self.blocks)], strict=True))
        self.parts = [{take: self._part(*span, take) for take in (True, False)} for span in self.spans]

    def _routes(self, l: int) -> bool:
        return isinstance(self.module, MixtureOfDepths) and l in self.module._routed

    def _part(self, begin: int, end: int, take: bool) -> Traced:
        """Blocks begin..end-1 of one token, the first of them only if it is to `take` it: (state, what the
        next router says or, at the end, the token)."""

        def body(caches, x):
            h = self.backbone.embed(x) if begin == 0 else x
            mask = caches[begin].make_mask(1)
            for l in range(begin, end):
                new = self.blocks[l](h, mask, cache=caches[l])
                h = new if take or l > begin else h  # of a block that is passed by, only keys and values
            if end < len(self.blocks):
                return h, self.module.score(end, h)
            return h, mx.argmax(self.backbone.head(h), axis=-1)

        return Traced(body, self.backbone.depth, range(begin, end))

    def token(self, token: int, cache: list, threshold: float) -> tuple[int, int]:
        """(the next token, blocks run)."""
        h, said, run, take = mx.array([[token]]), None, 0, True  # nothing stands before the first part
        for part, (begin, end) in zip(self.parts, self.spans, strict=True):
            if begin:
                take = said.item() > threshold
            run += end - begin - (not take)
            h, said = part[take](cache, h)
        return said.item(), run

    def begin(self, prompt, capacity):
        """The prompt passes the whole changed model."""
        self._cache = self.backbone.new_cache(capacity)
        if len(prompt) > 1:
            for tokens in chunks(mx.array([prompt[:-1]])):
                self._read(tokens, self._cache, self.threshold)
                mx.eval([(c.keys, c.values) for c in self._cache[: len(self.blocks)]])

    def step(self, pending, left):
        new, run = self.token(pending, self._cache, self.threshold)
        return Emitted([new], depth=run)

    def generate(
        self, prompt: list[int], threshold: float, max_tokens: int = 128, given: list[int] | None = None
    ) -> Generation:
        """`driver.generate` with this threshold."""
        self.threshold = threshold
        return driver.generate(self, prompt, max_tokens, given=given)

    def _read(self, tokens: mx.array, cache: list, threshold: float) -> None:
        """A part (1, T) of a prompt, all its tokens at once."""
        h = self.backbone.embed(tokens)
        mask = cache[0].make_mask(tokens.shape[1])
        for l, block in enumerate(self.blocks):
            new = block(h, mask, cache=cache[l])
            h = mx.where(self.module.score(l, h) > threshold, new, h) if self._routes(l) else new
