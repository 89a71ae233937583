"""Kinds of values on the command line, as `argparse` wants them: each refuses in one clear line."""

import argparse

from ..common import UserError, size_or_share

LARGEST = 2**53  # of whole numbers, so that each is exact as a float as well


def size(text):
    """A type for argparse: bytes, such as 64MB."""
    value = budget(text)
    if isinstance(value, float):
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 64MB")
    return value


def number(kind, least, most=None, above=False):
    """A type for argparse: an int or float from `least` (or above it) to `most`."""

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
    """A type for argparse: names out of `known`, separated by commas; `all` are all of them."""

    def names(text):
        asked = [name.strip() for name in text.split(",") if name.strip()]
        if asked == ["all"]:
            return list(known)
        if not asked or (unknown := [name for name in asked if name not in known]):
            wrong = f"there is no {', '.join(unknown)}" if asked else "an empty list names none"
            raise argparse.ArgumentTypeError(f"{wrong}; choose of {', '.join(known)}, or all")
        return list(dict.fromkeys(asked))

    return names


def budget(text):
    """A type for argparse: bytes (int, `64MB`), or a share of the whole (float up to 1, `25%`)."""
    try:
        return size_or_share(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shares(text):
    """A type for argparse: shares of the whole, separated by commas."""
    found = [budget(each) for each in text.split(",")]
    if not all(isinstance(share, float) for share in found):
        raise argparse.ArgumentTypeError(f"'{text}' are no shares such as 12.5%,25%")
    return found


count, natural = number(int, 1), number(int, 0)


def counts(text):
    """A type for argparse: whole numbers from 1, separated by commas."""
    return tuple(count(each.strip()) for each in text.split(","))
