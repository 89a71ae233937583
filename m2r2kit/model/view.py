"""A private copy of a model's modules, which shares its weights.

The kit replaces some layers: for fewer operations in compiled passes (`compiled.py`), and for one offset for
each position (`rotation.py`). The replacements are in the copy, so the model, its classes and other threads
are not affected.
"""

import copy
import types
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from . import compiled
from .mlxlm import activations, base
from .rotation import SharedRoPE, by_position

LAYERS = {nn.Linear: compiled.LeanLinear, nn.Embedding: compiled.LeanEmbedding}
FUNCTIONS = {  # name in mlx-lm's model files -> (mlx-lm's function, replacement)
    "swiglu": (activations.swiglu, compiled.swiglu),
    "scaled_dot_product_attention": (base.scaled_dot_product_attention, compiled.attention),
}


def private(module: nn.Module, name: str = "") -> nn.Module:
    """A copy of a module, with the kit's layers and the same arrays.

    Args:
        name: of the module in its parent; mlx-lm's blocks call their rotary embedding `rope`.
    """
    clone = copy.copy(module)
    clone._no_grad = set(module._no_grad)  # otherwise freezing the copy would freeze the module
    clone.__class__ = _class(type(module), name == "rope")
    for key, value in module.items():
        clone[key] = _copied(value, key)
    return clone


def follow(view: nn.Module, module: nn.Module) -> bool:
    """Update a private copy with the new arrays and layers of its module, in place; returns whether there
    were any."""
    found = [_follow(view, key, value, key) for key, value in module.items()]
    return any(found)


def _follow(holder: dict | list, key, value, name: str = "") -> bool:
    mine = holder[key] if isinstance(holder, list) else holder.get(key)
    if isinstance(value, nn.Module) and type(mine) is _class(type(value), name == "rope"):
        return follow(mine, value)
    if isinstance(value, list) and isinstance(mine, list) and len(value) == len(mine):
        return any([_follow(mine, i, each) for i, each in enumerate(value)])
    if mine is value or not isinstance(value, (mx.array, nn.Module, list)):
        return False
    holder[key] = _copied(value, name)
    return True


def _copied(value, name: str = ""):
    if isinstance(value, nn.Module):
        return private(value, name)
    return [_copied(each) for each in value] if isinstance(value, list) else value


@cache
def _class(kind: type, rotary: bool) -> type:
    """The class of a layer in the copy: the kit's replacement, or its own class.

    A class whose `__call__` uses one of `FUNCTIONS` gets a subclass that uses the replacement.
    """
    if rotary:
        return SharedRoPE if kind is nn.RoPE else by_position(kind)
    if kind in LAYERS:
        return LAYERS[kind]
    call = kind.__call__
    if not isinstance(call, types.FunctionType):
        return kind
    known = call.__globals__
    used = [name for name, (theirs, _) in FUNCTIONS.items() if known.get(name) is theirs]
    ours = {name: FUNCTIONS[name][1] for name in used if name in call.__code__.co_names}
    if not ours:
        return kind
    rebound = types.FunctionType(
        call.__code__, {**known, **ours}, call.__name__, call.__defaults__, call.__closure__
    )
    rebound.__kwdefaults__ = call.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": rebound, "__module__": kind.__module__})
