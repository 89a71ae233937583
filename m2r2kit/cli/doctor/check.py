"""What one check finds."""

from dataclasses import dataclass, field


@dataclass
class Check:
    """One finding. `advice` says what to do, or for an OK one what could be gained."""

    name: str
    value: str
    ok: bool
    advice: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
