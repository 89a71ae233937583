"""The door: M2R2 for a model of mlx-lm, in the shape of mlx-lm.

    from mlx_lm import load
    import m2r2kit as m2

    model, tokenizer = load("mlx-community/...")
    stream = m2.train_stream(model, tokenizer, exits=(4,), steps=2000)
    for r in m2.stream_generate(model, tokenizer, "...", stream=stream):
        print(r.text, end="")

Everywhere `model` and `tokenizer` are what `mlx_lm.load` returns; neither is changed. In the place of the
model its folder or repository may stand, with None for the tokenizer; it is then loaded for this one call.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from weakref import finalize

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import driver
from .common import UserError
from .driver import Decoder, Generation
from .experts import packing
from .experts.decode import ExpertDecoder
from .experts.opening import open_experts
from .experts.store import Manifest
from .model.backbone import Backbone
from .model.cpu.threads import restore as restore
from .model.mlxlm import GenerationResponse, TokenizerWrapper
from .speculation import Sampler, Speculation
from .speculation.reference import MlxLm
from .speculation.registry import ready
from .stream.stream import AcceleratedStream, StreamConfig, check
from .stream.trained import TrainedStream
from .text.rows import SMALL

KEPT = "_m2r2kit"  # where a model object keeps its view, so that both are freed together


@dataclass
class View:
    """What is kept of a model object between two calls.

    Attributes:
        experts: the decoder of a model whose experts are on disk.
    """

    backbone: Backbone
    experts: ExpertDecoder | None = None

    def __deepcopy__(self, memo):
        """A copy of the model, a pickled one included, gets a view of its own."""

    def __reduce__(self):
        return type(None), ()


def load(
    path_or_repo: str | Path,
    experts: str | Path | None = None,
    budget: int | float | str = 0.5,
    predictor: str = "next-router",
    adapter: str | Path | None = None,
    **reading,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model, as `mlx_lm.load` does; a mixture's experts may stay on disk.

    On a CPU weights become float32, in which it is fastest and exact.

    Args:
        path_or_repo: a folder, or a Hugging Face repository.
        experts: a store that `pack` wrote. The model then has no experts of its own; `generate` and
            `stream_generate` read them when they are needed, and decode what the whole model would.
        budget: memory for experts, as bytes or a share of all: `64e6`, `"64MB"`, `0.25`, `"25%"`.
        predictor: who predicts experts ahead of time, so that their reads are over when they are needed:
            `next-router`, `m2r2` (arXiv 2502.02040) and others of `m2r2kit generate --help`.
        adapter: folder of a LoRA adapter that `mlx_lm.lora` wrote for this model.
        reading: further settings of the store: `policy`, `distance`, `width`, `stream`, `reads`, `threads`,
            `link`, as the options of `m2r2kit generate`.

    Returns:
        (model, tokenizer).

    Raises:
        UserError: the model or store is missing, damaged or does not fit, or a setting is out of range.
    """
    if experts is None:
        if reading:
            raise UserError(f"{sorted(reading)[0]} is a setting of experts on disk; give their store too.")
        backbone, decoder = Backbone.load(path_or_repo, adapter=adapter), None
    else:
        if adapter is not None:
            raise UserError("Experts on disk are those of the model alone; leave out the adapter.")
        decoder = open_experts(path_or_repo, experts, budget=budget, predictor=predictor, **reading)
        backbone = decoder.backbone
    backbone.model.__dict__[KEPT] = View(backbone, decoder)
    if decoder:
        finalize(backbone.model, decoder.reader.close)
    return backbone.model, backbone.tokenizer


def load_stream(folder: str | Path, model: nn.Module, tokenizer=None) -> TrainedStream:
    """Load the accelerated stream of a model, with the settings that were tuned for it.

    Args:
        folder: that `TrainedStream.save` or `m2r2kit train stream` wrote.
        tokenizer: of the model; without it the stream is compared with the model when it is first used.

    Raises:
        UserError: there is none, it is damaged, or it was trained for another model.
    """
    view = _view(model, tokenizer)
    stream = TrainedStream.load(view.backbone, folder, check=False)
    if view.backbone.tokenizer is not None:
        stream = stream.bound_to(view.backbone)
    return stream


def generate(
    model: nn.Module | str | Path, tokenizer, prompt, max_tokens: int = 128, verbose: bool = False, **settings
) -> Generation:
    """Generate text; arguments and errors (`UserError`) as of `stream_generate`.

    Args:
        verbose: print the text as it comes.

    Returns:
        the whole result: `str()` of it is the text, and it has the tokens, which of them were drafted, how
        many drafts were accepted in each step, and the seconds.
    """
    out, view = Generation(), _view(model, tokenizer)
    for segment in _segments(view, _ids(view.backbone, prompt), max_tokens, out, **settings):
        if verbose:
            print(segment.text, end="\n" if segment.stopped else "", flush=True)
    return out


def stream_generate(
    model: nn.Module | str | Path, tokenizer, prompt, max_tokens: int = 128, **settings
) -> Iterator[GenerationResponse]:
    """Generate text token by token, as `mlx_lm.stream_generate` does, and faster with a trained stream.

    Greedy tokens are those of mlx-lm, and sampled ones have the same distribution, whatever drafts them.

    Args:
        prompt: as mlx-lm takes it: a text to continue (no chat template is added) or token ids; or the turns
            of a conversation, dicts of `role` and `content`, which get the model's chat template.
        max_tokens: generate at most this many, and no more than the model's context holds.
        stream: the accelerated stream that drafts, from `train_stream` or `load_stream`, or its folder.
        method: who drafts, by its name in `m2r2kit generate --help`; by default `m2r2` where there is a
            stream and `plain` where there is none.
        drafts: tokens drafted in a step, 0..16; by default as the stream was tuned.
        exit: block after which to draft; by default the stream's first exit.
        drafters: folder of trained drafters, for the methods that need one.
        temp, top_p, top_k, min_p, seed: how tokens are drawn; a temperature of 0 takes the likeliest.
        stop: words that end the text; they are not part of it.

    Yields:
        mlx-lm's `GenerationResponse` for each token. `from_draft` says whether it was drafted; `logprobs` is
        None, as they are not computed; `finish_reason` is `stop` (an end of text or a stop word) or
        `length` for the last one and None before.

    Raises:
        UserError: a setting is out of range, the stream belongs to another model, or the prompt is empty or
            longer than the context.
    """
    out, view = Generation(), _view(model, tokenizer)
    ids = _ids(view.backbone, prompt)
    begun = first = time.perf_counter()
    segments = _segments(view, ids, max_tokens, out, **settings)
    for n, segment in enumerate(segments, 1):
        now = time.perf_counter()
        first = now if n == 1 else first
        yield GenerationResponse(
            text=segment.text,
            token=segment.token,
            logprobs=None,
            from_draft=segment.from_draft,
            prompt_tokens=len(ids),
            prompt_tps=len(ids) / (first - begun),
            generation_tokens=n,
            generation_tps=n / max(now - first, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason={"eos": "stop"}.get(segment.stopped, segment.stopped),
        )


def train_stream(
    model: nn.Module | str | Path,
    tokenizer,
    exits: Sequence[int] = (4,),
    steps: int = 2000,
    rows: int = 2400,
    batch: int = 8,
    seed: int = 0,
    corpus: str | Path | None = None,
    tune: bool = True,
    report: Callable[[int, float], None] | None = None,
    **config,
) -> TrainedStream:
    """Train the accelerated stream of a model (M2R2, arXiv 2502.02040); the model stays as it is.

    The model generates most of its training text itself, which is kept in the cache folder. A small model
    is trained for in float32.

    Args:
        exits: blocks after which the stream is read, rising; drafts are read at the first.
        steps, batch: training steps, and rows of text in each.
        rows: rows of 192 tokens to learn from.
        corpus: folder of text; by default it is downloaded (`m2r2kit train stream --help`).
        tune: choose how long drafts are on this machine, which takes a minute or more.
        report: called with (step, loss) after each step.
        config: further fields of `StreamConfig`, such as `rate`, `rank` or `form`.

    Returns:
        a stream that drafts for `stream_generate`; `save(folder)` writes it.

    Raises:
        UserError: exits or settings that the model cannot have, or too little text.
    """
    from .bench.tune import tune_stream
    from .stream import train as distillation
    from .stream.distil import DistilConfig, needs
    from .text.rows import text

    backbone = _in_float32(_view(model, tokenizer).backbone)
    if unknown := config.keys() - {field.name for field in fields(StreamConfig)}:
        raise UserError(f"A stream has no setting '{sorted(unknown)[0]}'; see help(m2r2kit.StreamConfig).")
    if rows < batch:
        raise UserError(f"{rows} rows of text do not fill one batch; ask for at least {batch}.")
    if backbone.is_moe:
        config = {"form": "attention"} | config  # a block of its own would need experts of its own
    asked = StreamConfig(exits=tuple(exits), **config)
    check(backbone, asked)
    mx.random.seed(seed)
    module = AcceleratedStream(backbone, asked)
    train, _ = text(backbone, corpus, rows, seed)
    batches = distillation.teacher_batches(backbone, train, *needs(module), batch)
    settings = DistilConfig(steps=steps, seed=seed)
    trained = distillation.train_stream(backbone, asked, batches, [], settings, report=report, module=module)
    facts = {"steps": steps, "train_seconds": round(trained.seconds)}
    if tune:
        facts |= tune_stream(backbone, module)[0]
    return TrainedStream(module, facts)


def pack(model: str | Path, store: str | Path, report: Callable[[int, int], None] | None = None) -> Manifest:
    """Write the experts of a mixture into a store, from which one expert at a time can be read.

    Args:
        model: a folder, or a Hugging Face repository.
        store: a new folder, about as large as the model's experts.
        report: called as (bytes of a finished block, bytes of all) after each block.

    Returns:
        the store's manifest: blocks, experts, bytes of a record.

    Raises:
        UserError: the model is no mixture of a served family, the store exists, or the disk is too small.
    """
    return packing.pack(model, store, report)


# --- what the command line uses as well -------------------------------------------------------


def decoder_of(
    backbone: Backbone,
    method: str,
    stream: TrainedStream | str | Path | None = None,
    drafters: str | Path | None = None,
    exit: int | None = None,
    drafts: int | None = None,
) -> Decoder:
    """The decoder of a method that loses nothing; arguments as of `stream_generate`."""
    if method == "mlx_lm":
        return MlxLm(backbone)
    stream = Path(stream) if isinstance(stream, str) else stream
    drafters = None if drafters is None else Path(drafters)
    return Speculation(backbone, *ready(method, backbone, stream, drafters, exit, drafts))


def draw(decoder: Decoder, sampler: Sampler) -> None:
    """Let a decoder choose tokens as a sampler says."""
    if isinstance(decoder, ExpertDecoder):
        decoder.choose = None if sampler.greedy else sampler.choose
    elif isinstance(decoder, MlxLm):
        decoder.sampler = sampler.of_mlx_lm(decoder.backbone.config["vocab_size"])
    else:
        decoder.sampler = sampler


# --- model objects ----------------------------------------------------------------------------


def _segments(
    view: View,
    prompt: list[int],
    max_tokens: int,
    out: Generation,
    stop: Sequence[str] = (),
    stream: TrainedStream | str | Path | None = None,
    method: str | None = None,
    drafts: int | None = None,
    exit: int | None = None,
    drafters: str | Path | None = None,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Iterator[driver.Segment]:
    sampler = Sampler(temp, top_k, top_p, seed, min_p)
    if isinstance(stop, str):
        stop = (stop,)
    if view.experts:
        if stream is not None or method not in (None, "plain"):
            raise UserError("A model with experts on disk decodes plainly; leave out the stream and method.")
        decoder = view.experts
    else:
        method = method or ("plain" if stream is None else "m2r2")
        decoder = decoder_of(view.backbone, method, stream, drafters, exit, drafts)
    draw(decoder, sampler)
    return driver.stream(decoder, prompt, max_tokens, stop, out)


def _ids(backbone: Backbone, prompt) -> list[int]:
    """Token ids of a prompt in any form."""
    if isinstance(prompt, str):
        return backbone.encode(prompt, chat=False)
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if ids and isinstance(ids[0], dict):
        return backbone.encode_turns(ids)
    return ids


def _view(model: nn.Module | str | Path, tokenizer=None) -> View:
    """The view of a model: kept with it, or loaded by its name."""
    if isinstance(model, str | Path):
        return View(Backbone.load(model))
    if not isinstance(model, nn.Module):
        raise UserError("A model is what `mlx_lm.load` returns, or a folder or repository.")
    kept = model.__dict__.get(KEPT)
    if kept is None or kept.backbone.model is not model:  # a copy of a model brings the other one's view
        kept = model.__dict__[KEPT] = View(Backbone.of(model, None))
    if kept.experts:
        return kept
    kept.backbone.refresh()
    mine = kept.backbone.tokenizer
    if tokenizer is not None and _bare(tokenizer) is not _bare(mine):
        if not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        if mine is not None:
            kept = model.__dict__[KEPT] = View(Backbone.of(model, tokenizer))
        else:  # what is bound to the view stays bound
            kept.backbone.name(tokenizer)
    return kept


def _bare(tokenizer):
    return getattr(tokenizer, "_tokenizer", tokenizer)


def _in_float32(backbone: Backbone) -> Backbone:
    """The view to train for: of a small model in half precision a copy, as that would blur what is learnt."""
    weights = [w for _, w in tree_flatten(backbone.model.parameters())]
    half = any(w.dtype in (mx.float16, mx.bfloat16) for w in weights)
    if not half or sum(w.size for w in weights) > SMALL:
        return backbone
    copy = deepcopy(backbone.model)
    copy.set_dtype(mx.float32)
    return Backbone.of(copy, backbone.tokenizer)
