"""Argument types for `argparse`; each rejects a bad value in one line."""

import argparse

from ..common import UserError, size_or_share

LARGEST = 2**53  # largest whole number: up to here a float is exact too


def size(text):
    """Bytes, such as 64MB."""
    value = budget(text)
    if isinstance(value, float):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 64MB")
    return value


def number(kind, least, most=None, above=False):
    """An int or float from `least` (or `above` it) to `most`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if kind is int and value is not None and value > LARGEST:
            raise argparse.ArgumentTypeError(f"'{text}' is too large; the largest whole number is {LARGEST}")
        if value is None or value != value or value < least or (above and value == least):
            value = None
        if value is None or (most is not None and value > most):
            what = "a whole number" if kind is int else "a number"
            limits = f"{'above' if above else 'from'} {least}" + (f" to {most}" if most is not None else "")
            raise argparse.ArgumentTypeError(f"'{text}' is not {what} {limits}")
        return value

    return convert


def some_of(known):
    """Names in `known`, separated by commas, or `all`."""

    def names(text):
        asked = [name.strip() for name in text.split(",") if name.strip()]
        if asked == ["all"]:
            return list(known)
        if not asked or (unknown := [name for name in asked if name not in known]):
            wrong = f"there is no {', '.join(unknown)}" if asked else "the list is empty"
            raise argparse.ArgumentTypeError(f"{wrong}; choose among {', '.join(known)}, or all")
        return list(dict.fromkeys(asked))

    return names


def budget(text):
    """Bytes (int, `64MB`) or a share of the whole (float up to 1, `25%`)."""
    try:
        return size_or_share(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shares(text):
    """Shares of the whole, separated by commas."""
    found = [budget(each) for each in text.split(",")]
    if not all(isinstance(share, float) for share in found):
        raise argparse.ArgumentTypeError(f"'{text}' are not shares such as 12.5%,25%")
    return found


count, natural = number(int, 1), number(int, 0)


def counts(text):
    """Whole numbers from 1, separated by commas."""
    return tuple(count(each.strip()) for each in text.split(","))
