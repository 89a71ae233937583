"""The result of one check."""

from dataclasses import dataclass, field


@dataclass
class Check:
    """One result. `advice` says what to do; if the check is OK, what is optional."""

    name: str
    value: str
    ok: bool
    advice: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
