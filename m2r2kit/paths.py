"""Where this kit keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder, which may not exist yet; `M2R2KIT_CACHE` names another one."""
    root = os.environ.get("M2R2KIT_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "m2r2kit"
