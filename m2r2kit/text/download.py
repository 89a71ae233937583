"""Download the two parts of the training corpus that Python does not bring.

- GSM8K (MIT): one file at a fixed commit, checked by SHA-256, so training sees the same bytes as ours.
- tldr-pages (CC BY 4.0): the English archive of release v2.2. The project may rebuild the archives of its
  releases, so there is no hash; `tldr_lines` checks the content instead. `data/pocket-dense` was trained on a
  later version (7,055 pages), so a retrained model is similar and not equal.

Neither is part of this project.
"""

import hashlib
import http.client
import io
import json
import re
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..common import UserError, cache_dir, check_writable, write_whole
from .corpus import GSM8K, TLDR

GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl"
)
GSM8K_SHA256 = "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
TLDR_URL = "https://github.com/tldr-pages/tldr/releases/download/v2.2/tldr-pages.en.zip"

LIMIT = 64 << 20  # bytes; both files together are under 10 MB
ELSEWHERE = f"or give a folder that holds {GSM8K} and {TLDR} as the corpus (--corpus)"


def corpus_folder(gsm8k: str = GSM8K_URL, tldr: str = TLDR_URL) -> Path:
    """The folder with both files, downloaded on the first call.

    Args:
        gsm8k, tldr: URLs of the files.

    Raises:
        UserError: a download fails, or a file has unexpected content.
    """
    folder = cache_dir() / "corpus"
    fetch(gsm8k, folder / GSM8K, gsm8k_lines)
    fetch(tldr, folder / TLDR, tldr_lines)
    return folder


def fetch(url: str, target: Path, convert: Callable[[bytes], bytes]) -> None:
    """Download `url`, convert it and write it to `target` atomically, if `target` does not exist.

    Args:
        convert: content -> what is written; raises ValueError for unexpected content.

    Raises:
        UserError: the download fails, the content is unexpected, or `target` cannot be written.
    """
    if target.exists():
        return
    check_writable(target)
    try:
        content = convert(_get(url))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be downloaded ({error}); check the network, {ELSEWHERE}") from None
    except ValueError as error:
        raise UserError(
            f"{url} is not what this kit expects ({error}); try again later, {ELSEWHERE}"
        ) from None
    write_whole(target, content)


def _get(url: str) -> bytes:
    content = io.BytesIO()
    with urllib.request.urlopen(url, timeout=30) as response:
        size = int(response.headers.get("Content-Length") or 0)
        name = url.rsplit("/", 1)[-1]
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=name, leave=False) as bar:
            while chunk := response.read(1 << 16):
                bar.update(content.write(chunk))
                if content.tell() > LIMIT:
                    raise ValueError(f"more than {LIMIT >> 20} MiB")
    if content.tell() < size:  # a dropped connection looks like the end of the file
        raise OSError(f"the connection ended after {content.tell():,} of {size:,} bytes")
    return content.getvalue()


def gsm8k_lines(content: bytes) -> bytes:
    """The content unchanged, if its SHA-256 is right; else ValueError."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != GSM8K_SHA256:
        raise ValueError(f"SHA-256 {digest[:12]}.. instead of {GSM8K_SHA256[:12]}..")
    return content


def tldr_lines(content: bytes, least: int = 4000) -> bytes:
    """JSON Lines from the archive's Markdown: one object a page (`page`, `text`), without links.

    Raises:
        ValueError: it is not a ZIP archive, has fewer than `least` pages, or lacks well-known ones.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        # the archive has one of two layouts: common/tar.md or pages/common/tar.md
        names = {
            f"{match[1]}/{match[2]}": name
            for name in archive.namelist()
            if (match := re.fullmatch(r"(?:.*\bpages/)?([\w-]+)/([^/]+)\.md", name))
        }
        pages = {page: archive.read(name).decode() for page, name in sorted(names.items())}
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"not an archive of pages: {error}") from None
    pages = {
        page: re.sub(r"^> More information: .*\n", "", text, flags=re.M)
        for page, text in pages.items()
        if text.startswith("# ") and re.search(r"^`.+`$", text, re.M)
    }
    known = {"common/tar", "common/curl", "common/git-commit"}
    if len(pages) < least or not known <= pages.keys():
        raise ValueError(f"{len(pages):,} pages instead of {least:,} or more with {', '.join(sorted(known))}")
    lines = [json.dumps({"page": page, "text": text}) for page, text in pages.items()]
    return ("\n".join(lines) + "\n").encode()
