"""The public API: M2R2 for mlx-lm models, with mlx-lm's conventions.

    from mlx_lm import load
    import m2r2kit as m2

    model, tokenizer = load("mlx-community/...")
    stream = m2.train_stream(model, tokenizer, exits=(4,), steps=2000)
    for r in m2.stream_generate(model, tokenizer, "...", stream=stream):
        print(r.text, end="")

`model` and `tokenizer` are what `mlx_lm.load` returns; neither is changed. Instead of a model object, each
function also takes a folder or a Hugging Face repository, with None as the tokenizer; it then loads the model
for this one call.

Early exits are not part of this API; they are on the command line (`m2r2kit generate --method exits`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from numbers import Integral
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
from .stream.stream import AcceleratedStream, StreamConfig, check, default_form
from .stream.trained import TrainedStream
from .text.rows import SMALL

KEPT = "_m2r2kit"  # attribute of a model object that holds its view, so that both are freed together


@dataclass
class View:
    """The kit's state for a model object, kept between calls.

    Attributes:
        experts: the decoder of a model whose experts are on disk; else None.
    """

    backbone: Backbone
    experts: ExpertDecoder | None = None

    def __deepcopy__(self, memo):
        """Return None: a copied or unpickled model gets a new view."""

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
    """Load a model, as `mlx_lm.load` does; the experts of a mixture may stay on disk.

    On a CPU the weights are converted to float32, which is the fastest type there and loses nothing.

    Args:
        path_or_repo: a folder or a Hugging Face repository.
        experts: an expert store that `pack` wrote. The model is then loaded without its experts. `generate`
            and `stream_generate` read them on demand, and generate the same tokens as the full model.
        budget: memory for experts, in bytes or as a share of all experts: `64e6`, `"64MB"`, `0.25`, `"25%"`.
        predictor: predicts experts ahead of time, so that they are read before they are needed:
            `next-router`, `m2r2` (arXiv 2502.02040) or another one in `m2r2kit generate --help`.
        adapter: folder of a LoRA adapter that `mlx_lm.lora` wrote for this model.
        reading: further settings of the expert store: `policy`, `distance`, `width`, `stream`, `reads`,
            `threads` and `link`, as in `m2r2kit generate --help`.

    Returns:
        (model, tokenizer).

    Raises:
        UserError: the model or the store is missing or damaged, they do not match, or a setting is out of
            range.
    """
    if experts is None:
        given = dict(budget=budget != 0.5, predictor=predictor != "next-router", **reading)
        if unused := sorted(name for name, value in given.items() if value):
            raise UserError(f"{unused[0]} needs experts on disk; give an expert store too.")
        backbone, decoder = Backbone.load(path_or_repo, adapter=adapter), None
    else:
        if adapter is not None:
            raise UserError("An expert store does not support adapters; leave out the adapter.")
        decoder = open_experts(path_or_repo, experts, budget=budget, predictor=predictor, **reading)
        backbone = decoder.backbone
    backbone.model.__dict__[KEPT] = View(backbone, decoder)
    if decoder:
        finalize(backbone.model, decoder.reader.close)
    return backbone.model, backbone.tokenizer


def load_stream(folder: str | Path, model: nn.Module, tokenizer=None) -> TrainedStream:
    """Load the accelerated stream of a model, with its tuned settings.

    Args:
        folder: a folder that `TrainedStream.save` or `m2r2kit train stream` wrote.
        model: the model that the stream was trained for.
        tokenizer: the model's tokenizer; without it, the check that the stream fits the model is made on
            first use.

    Raises:
        UserError: the stream is missing or damaged, or was trained for another model.
    """
    view = _view(model, tokenizer)
    stream = TrainedStream.load(view.backbone, folder, check=False)
    if view.backbone.tokenizer is not None:
        stream = stream.bound_to(view.backbone)
    return stream


def generate(
    model: nn.Module | str | Path, tokenizer, prompt, max_tokens: int = 128, verbose: bool = False, **settings
) -> Generation:
    """Generate text; other arguments and errors (`UserError`) as in `stream_generate`.

    Args:
        verbose: print the text while it is generated.

    Returns:
        a `Generation`: `str()` of it is the text; it also has the tokens, which of them were drafts, the
        number of accepted drafts in each step, and the seconds.
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

    With every method, greedy tokens equal mlx-lm's, and sampled tokens have the same distribution.

    Args:
        prompt: a text to continue (no chat template is added), token ids, or the turns of a conversation:
            dicts of `role` and `content`, which are put into the model's chat template.
        max_tokens: the most tokens to generate; the model's context is a limit too.
        stream: the accelerated stream that drafts, from `train_stream` or `load_stream`, or its folder.
        method: the decoding method, by its name under `methods` in `m2r2kit generate --help`; by default
            `m2r2` with a stream and `plain` without one.
        drafts: number of tokens drafted in a step, 0..16; by default the tuned number.
        exit: block after which to draft; by default the stream's first exit.
        drafters: folder of trained drafters, for the methods that need one.
        temp, top_p, top_k, min_p, seed: sampling settings; with `temp=0` decoding is greedy.
        stop: words that end the text; the text stops before the first of them.

    Yields:
        mlx-lm's `GenerationResponse` for each token. `from_draft` is True for accepted drafts; `logprobs` is
        None, because they are not computed; `finish_reason` is `stop` (an end of text or a stop word) or
        `length` for the last token, and None before.

    Raises:
        UserError: a setting is out of range, the stream was trained for another model, or the prompt is
            empty or longer than the context.
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
    """Train the accelerated stream of a model (M2R2, arXiv 2502.02040); the model is frozen.

    The model generates most of the training text itself; the text is kept in the cache folder. The stream of
    a small half-precision model is trained in float32.

    Args:
        exits: blocks after which the stream is read, in ascending order; drafts are read at the first.
        steps: number of training steps.
        rows: number of training sequences, of 192 tokens each.
        batch: sequences in each step.
        seed: of the initial parameters, the text and its order.
        corpus: folder with the training corpus; by default it is downloaded (`m2r2kit train stream --help`).
        tune: choose the draft length for this machine, which takes a minute or more.
        report: called with (step, loss) after each step.
        config: further fields of `StreamConfig`, such as `rate`, `rank` or `form`.

    Returns:
        a stream that drafts for `stream_generate`; `save(folder)` writes it.

    Raises:
        UserError: the exits or settings do not fit the model, a number is out of range, or there is too
            little text.
    """
    from .bench.tune import tune_stream
    from .stream import train as distillation
    from .stream.distil import DistilConfig, needs
    from .text.rows import text

    backbone = _in_float32(_view(model, tokenizer).backbone)
    if unknown := config.keys() - {field.name for field in fields(StreamConfig)}:
        raise UserError(f"A stream has no setting '{sorted(unknown)[0]}'; see help(m2r2kit.StreamConfig).")
    if steps < 1 or batch < 1:
        raise UserError(f"Training needs at least 1 step and 1 row a batch; got {steps} and {batch}.")
    if rows < batch:
        raise UserError(f"{rows} rows of text do not fill one batch; use at least {batch}.")
    asked = StreamConfig(exits=tuple(exits), **{"form": default_form(backbone)} | config)
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
    """Write the experts of a mixture into an expert store, from which single experts can be read.

    Args:
        model: a folder or a Hugging Face repository.
        store: a new folder; it becomes about as large as the model's experts.
        report: called with (bytes of a finished block, bytes of all blocks) after each block.

    Returns:
        the store's manifest: blocks, experts, bytes of a record.

    Raises:
        UserError: the model is not a mixture of a supported family, the store exists, or the disk is too
            small.
    """
    return packing.pack(model, store, report)


# --- also used by the command line ------------------------------------------------------------


def decoder_of(
    backbone: Backbone,
    method: str,
    stream: TrainedStream | str | Path | None = None,
    drafters: str | Path | None = None,
    exit: int | None = None,
    drafts: int | None = None,
) -> Decoder:
    """The decoder of a lossless method; arguments as in `stream_generate`."""
    if method == "mlx_lm":
        return MlxLm(backbone)
    stream = Path(stream) if isinstance(stream, str) else stream
    drafters = None if drafters is None else Path(drafters)
    return Speculation(backbone, *ready(method, backbone, stream, drafters, exit, drafts))


def draw(decoder: Decoder, sampler: Sampler) -> None:
    """Let a decoder choose its tokens with a sampler."""
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
            raise UserError("A model with experts on disk does not draft; leave out the stream and method.")
        decoder = view.experts
    else:
        method = method or ("plain" if stream is None else "m2r2")
        decoder = decoder_of(view.backbone, method, stream, drafters, exit, drafts)
    draw(decoder, sampler)
    return driver.stream(decoder, prompt, max_tokens, stop, out)


def _ids(backbone: Backbone, prompt) -> list[int]:
    """Token ids of a prompt in any form.

    Raises:
        UserError: it is not one of these forms, or an id is not in the model's vocabulary, which MLX does not
            check: it would read memory that is not the model's.
    """
    if isinstance(prompt, str):
        return backbone.encode(prompt, chat=False)
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(ids, bytes) or not isinstance(ids, Iterable):  # bytes would be taken for ids
        raise UserError("A prompt is a text, token ids or the turns of a conversation; give one of these.")
    ids = list(ids)
    if ids and isinstance(ids[0], dict):
        return backbone.encode_turns(ids)
    vocabulary = backbone.config["vocab_size"]
    if not all(isinstance(id, Integral) and 0 <= id < vocabulary for id in ids):
        raise UserError(f"The ids of a prompt must be whole numbers from 0 to {vocabulary - 1}.")
    return [int(id) for id in ids]


def _view(model: nn.Module | str | Path, tokenizer=None) -> View:
    """The view of a model: kept with the model object, or loaded by name."""
    if isinstance(model, str | Path):
        return View(Backbone.load(model))
    if not isinstance(model, nn.Module):
        raise UserError("The model must be what `mlx_lm.load` returns, or a folder or repository.")
    kept = model.__dict__.get(KEPT)
    if kept is None or kept.backbone.model is not model:  # a shallow copy brings the original's view
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
        else:  # keep the view, because streams are bound to it
            kept.backbone.name(tokenizer)
    return kept


def _bare(tokenizer):
    return getattr(tokenizer, "_tokenizer", tokenizer)


def _in_float32(backbone: Backbone) -> Backbone:
    """The view to train with: a small half-precision model is copied to float32, for exact targets."""
    weights = [w for _, w in tree_flatten(backbone.model.parameters())]
    half = any(w.dtype in (mx.float16, mx.bfloat16) for w in weights)
    if not half or sum(w.size for w in weights) > SMALL:
        return backbone
    copy = deepcopy(backbone.model)
    copy.set_dtype(mx.float32)
    return Backbone.of(copy, backbone.tokenizer)
