"""A private copy of a model's structure, which shares its weights.

The kit computes with other layers than a model brings: in a compiled pass with fewer operations
(`compiled.py`), and with positions given one by one (`rotation.py`). They stand in a copy. The model keeps
its own modules and its classes, and other threads keep computing as before.
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
FUNCTIONS = {  # that mlx-lm's model files import by name
    "swiglu": (activations.swiglu, compiled.swiglu),
    "scaled_dot_product_attention": (base.scaled_dot_product_attention, compiled.attention),
}


def private(module: nn.Module, name: str = "") -> nn.Module:
    """A copy of a module, for the kit's own use, with the same arrays in it.

    Args:
        name: under which its parent has it; mlx-lm's blocks call their rotary embedding `rope`.
    """
    clone = copy.copy(module)
    clone._no_grad = set(module._no_grad)  # or freezing the copy would freeze the module
    clone.__class__ = _class(type(module), name == "rope")
    for key, value in module.items():
        clone[key] = _copied(value, key)
    return clone


def follow(view: nn.Module, module: nn.Module) -> bool:
    """Take over the arrays and layers that a module was given since `view` was made of it; whether there
    were any. What holds a part of the view sees them too."""
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
    """The class that a layer has in the copy: itself, unless the kit has another way for it."""
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
