"""The parts of mlx-lm that the kit uses, imported in one place, so that the process keeps its limits.

mlx-lm sets the limits of open files to 2,048 and 4,096 when it is imported. Where the hard limit is lower,
that fails; where it is higher, it stays lowered for good. Here only the soft limit rises, as far as it may.
"""

# ruff: noqa: F401
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

FILES = 2048  # that models of many files want open at once


@contextmanager
def limits_kept() -> Iterator[None]:
    """Let this thread's imports change no limit of open files."""
    change, importing = resource.setrlimit, threading.get_ident()

    def unless_importing(which, limits):
        if which != resource.RLIMIT_NOFILE or threading.get_ident() != importing:
            change(which, limits)

    resource.setrlimit = unless_importing
    try:
        yield
    finally:
        resource.setrlimit = change


def raise_soft_limit() -> None:
    """Allow `FILES` open files, or as many as the hard limit does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


with limits_kept():
    from mlx_lm import utils
    from mlx_lm.generate import GenerationResponse, generate_step
    from mlx_lm.models import activations, base, llama, olmoe
    from mlx_lm.models.base import create_attention_mask
    from mlx_lm.models.cache import KVCache
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.utils import dequantize_model, load_model

raise_soft_limit()
