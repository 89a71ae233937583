"""Decoding with the baselines of `depths.py`: the first blocks only, or routers that let a token skip
blocks.

A router decides on the state at its block, so each pass ends there, and the next one depends on the
decision:

    first part | router | block, or its keys and values only; blocks up to the next router | router | ..
"""

import mlx.core as mx

from .. import driver
from ..driver import Decoder, Emitted, Generation
from ..model.backbone import Backbone
from ..model.cache import Traced, chunks
from .depths import MixtureOfDepths, Shallow


class DepthDecoder(Decoder):
    """A model that decodes with `Shallow` or `MixtureOfDepths`, with the weights at construction.

    Attributes:
        threshold: score above which a routed block processes a token. It may change between texts.
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
        """Blocks begin..end-1 for one token, the first of them only if `take`: (state, the next router's
        score or, at the end, the token).
        """

        def body(caches, x):
            h = self.backbone.embed(x) if begin == 0 else x
            mask = caches[begin].make_mask(1)
            for l in range(begin, end):
                new = self.blocks[l](h, mask, cache=caches[l])
                h = new if take or l > begin else h  # a skipped block computes only keys and values
            if end < len(self.blocks):
                return h, self.module.score(end, h)
            return h, mx.argmax(self.backbone.head(h), axis=-1)

        return Traced(body, self.backbone.depth, range(begin, end))

    def token(self, token: int, cache: list, threshold: float) -> tuple[int, int]:
        """(the next token, number of blocks run)."""
        h, said, run, take = mx.array([[token]]), None, 0, True  # the first part has no router
        for part, (begin, end) in zip(self.parts, self.spans, strict=True):
            if begin:
                take = said.item() > threshold
            run += end - begin - (not take)
            h, said = part[take](cache, h)
        return said.item(), run

    def begin(self, prompt, capacity):
        """Run the prompt through the modified model."""
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
        """Run a chunk of a prompt (1, T) in one pass."""
        h = self.backbone.embed(tokens)
        mask = cache[0].make_mask(tokens.shape[1])
        for l, block in enumerate(self.blocks):
            new = block(h, mask, cache=cache[l])
            h = mx.where(self.module.score(l, h) > threshold, new, h) if self._routes(l) else new
