"""The parts of mlx-lm that the kit uses, imported in one place to keep the process's limits.

On import, mlx-lm sets the soft and hard limits of open files to 2,048 and 4,096. This fails if the hard limit
is lower, and lowers it for good if it is higher. Here only the soft limit is raised.
"""

# ruff: noqa: F401
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

FILES = 2048  # open files that models of many files need


@contextmanager
def limits_kept() -> Iterator[None]:
    """Ignore changes of the limits of open files by this thread's imports."""
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
    """Raise the soft limit to `FILES` open files, or to the hard limit if that is lower."""
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
