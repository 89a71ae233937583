"""The expert store: the experts of a model as records; one read loads one expert.

    STORE/manifest.json     the layout, the SHA-256 of each record, and a checksum of the manifest
    STORE/block-07.bin      the experts of block 7, one record after the other
    STORE/model.json        stamps of the model's weight files when their hash was last computed

A record holds gate, up and down of one expert, padded to whole pages of 4 KiB, because direct reads must
begin and end at a page. All records of a block have the same size; blocks may differ, as in models with mixed
quantization.

What is checked:

- the manifest against its own checksum when the store is opened, and against the model when it is used;
- each record against its SHA-256 when it is first read through a `Store`, and by `pack --verify`;
- each later read against a `quick_sum` taken at the first. It runs at memory speed and misses a flipped bit
  or a lost or swapped page once in 2^32 cases. A record that is damaged while in use raises an error instead
  of changing the text.
"""

import hashlib
import json
import math
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..common import UserError, parse_json, write_whole
from ..model.folder import weight_files
from ..model.hashes import weights_sha256

FORMAT = 2
PAGE = 4096  # bytes
MANIFEST, STAMPS = "manifest.json", "model.json"
DTYPES = ("float32", "float16", "bfloat16")  # that a model computes in
NAMES = {
    "family": "type",
    "dtype": "arithmetic",
    "blocks": "list of blocks with experts",
    "experts": "number of experts",
    "top_k": "number of experts that run for a token",
    "pieces": "layout of a record",
}


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(frozen=True)
class Piece:
    """One tensor of an expert inside its record: `shape` and `dtype` as MLX has them, `offset` and
    `nbytes` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """The contents of a store.

    Attributes:
        model_sha256: hash of the weight files that it was packed from (`hashes.weights_sha256`).
        family: the model's type.
        dtype: dtype that the model computes in, such as `float32`.
        blocks: indices of the blocks that have experts.
        experts: E, the experts of each block; `top_k` of them run for a token.
        pieces: for each of `blocks`, the pieces of its records.
        sha256: for each of `blocks`, the hash of each of its E records, padding included.
    """

    model_sha256: str
    family: str
    dtype: str
    blocks: tuple[int, ...]
    experts: int
    top_k: int
    pieces: tuple[tuple[Piece, ...], ...]
    sha256: tuple[tuple[str, ...], ...]

    def pieces_of(self, block: int) -> tuple[Piece, ...]:
        """The pieces of a block's records."""
        return self.pieces[self.blocks.index(block)]

    def record_size(self, block: int) -> int:
        """Bytes of each record of a block, a multiple of `PAGE`."""
        return padded(_end(self.pieces_of(block)))

    @property
    def quantized(self) -> bool:
        """Whether records hold quantized weights."""
        return any(piece.name.endswith(".scales") for pieces in self.pieces for piece in pieces)

    @property
    def one_size(self) -> bool:
        """Whether records of all blocks consist of the same pieces."""
        return len(set(self.pieces)) == 1

    @property
    def record_bytes(self) -> int:
        """Bytes of the largest record."""
        return padded(max(map(_end, self.pieces)))

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot in every block, without padding."""
        return sum(map(_end, self.pieces))

    @property
    def total_bytes(self) -> int:
        """Bytes of all records."""
        return self.experts * sum(padded(_end(pieces)) for pieces in self.pieces)

    @property
    def mean_record_bytes(self) -> int:
        """Bytes of a record, mean over blocks."""
        return self.total_bytes // (self.experts * len(self.blocks))

    def to_json(self) -> str:
        value = {"format": FORMAT, "page": PAGE, **asdict(self)}
        return json.dumps(value | {"checksum": _checksum(value)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError, KeyError, TypeError, AttributeError or RecursionError if this is not a
        manifest."""
        value = parse_json(text)
        if value["format"] != FORMAT or value["page"] != PAGE:
            raise ValueError("it was written by another version of this kit")
        if value.pop("checksum") != _checksum(value):
            raise ValueError("it was changed after it was written")
        del value["format"], value["page"]
        value["pieces"] = tuple(
            tuple(Piece(**(p | {"shape": tuple(p["shape"])})) for p in pieces) for pieces in value["pieces"]
        )
        value["blocks"] = tuple(value["blocks"])
        value["sha256"] = tuple(tuple(block) for block in value["sha256"])
        manifest = cls(**value)
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises ValueError if the fields are inconsistent."""
        if self.dtype not in DTYPES:
            raise ValueError(f"its arithmetic is {self.dtype}")
        for pieces in self.pieces:
            end = 0
            for piece in pieces:
                size = math.prod(piece.shape) * getattr(mx, piece.dtype).size
                if piece.offset != end or piece.nbytes != size:
                    raise ValueError(f"{piece.name} has a wrong offset or size")
                end += size
            if not end:
                raise ValueError("its records are empty")
        counts = {len(self.blocks), len(self.pieces), len(self.sha256)}
        if not 1 <= self.top_k <= self.experts or len(counts) != 1 or not self.blocks:
            raise ValueError("its counts are inconsistent")
        if any(len(block) != self.experts for block in self.sha256):
            raise ValueError("a record has no checksum")


def _end(pieces: tuple[Piece, ...]) -> int:
    """Bytes of a record without its padding."""
    return pieces[-1].offset + pieces[-1].nbytes


def _checksum(value: dict) -> str:
    """Checksum of a manifest's other fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def quick_sum(record: np.ndarray) -> int:
    """A checksum at memory speed: the CRC-32 of each page's sum of 64-bit words.

    Args:
        record: uint8, whole pages.
    """
    return zlib.crc32(record.view(np.uint64).reshape(-1, PAGE // 8).sum(axis=1))


def file_name(block: int) -> str:
    return f"block-{block:02d}.bin"


def stamps(model: Path) -> list[list]:
    """Name, size, times of change, inode and device of each weight file of a model's folder. They change when
    a file is rewritten, even if its modification time is restored."""
    files = [(path.name, path.stat()) for path in weight_files(model)]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for name, s in files]


def stamped(sha256: str, files: list[list]) -> str:
    """Content of `model.json`: files with these `stamps` have this hash."""
    return json.dumps({"sha256": sha256, "files": files})


class Store:
    """A store on disk. Opening it reads the manifest and checks the sizes of the files, not their contents.

    Raises:
        UserError: there is none, it is incomplete, or another version of this kit wrote it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._verified: dict[tuple[int, int], int] = {}  # records with the right SHA-256 -> quick sum
        file = self.folder / MANIFEST
        if not file.exists():
            raise UserError(f"There is no expert store in {folder}; make one with `m2r2kit pack MODEL OUT`.")
        try:
            self.manifest = Manifest.from_json(file.read_text())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} cannot be used ({error}); {self._again}.") from error
        for block in self.manifest.blocks:
            path, size = self.path(block), self.manifest.experts * self.manifest.record_size(block)
            if not path.is_file():
                raise UserError(f"{self.folder} lacks {path.name}; {self._again}.")
            if path.stat().st_size != size:
                raise UserError(f"{path} has {path.stat().st_size} bytes, not {size}; {self._again}.")

    @property
    def _again(self) -> str:
        return f"delete {self.folder} and pack the model again"

    def path(self, block: int) -> Path:
        """The file with the experts of a block."""
        return self.folder / file_name(block)

    def checksum(self, block: int, expert: int) -> str:
        return self.manifest.sha256[self.manifest.blocks.index(block)][expert]

    def is_right(self, block: int, expert: int, record: np.ndarray) -> bool:
        """Whether a record (uint8, with padding) is the one that was packed: by SHA-256 the first time, then
        by `quick_sum`. Thread-safe."""
        key, found = (block, expert), quick_sum(record)
        if key in self._verified:
            return self._verified[key] == found
        if hashlib.sha256(record).hexdigest() != self.checksum(block, expert):
            return False
        self._verified[key] = found
        return True

    def damaged(self, report=None) -> list[tuple[int, int]]:
        """All (block, expert) whose record is not the one that was packed; reads the whole store.

        Args:
            report: called with the bytes of each record.
        """
        found = []
        for block in self.manifest.blocks:
            size = self.manifest.record_size(block)
            with self.path(block).open("rb") as file:
                for expert in range(self.manifest.experts):
                    if hashlib.sha256(file.read(size)).hexdigest() != self.checksum(block, expert):
                        found.append((block, expert))
                    if report:
                        report(size)
        return found

    def model_sha256(self, model: Path) -> str:
        """`weights_sha256` of a model's folder. For a large model this takes minutes, so it is computed again
        only if the weight files have changed since the last time."""
        file, now = self.folder / STAMPS, stamped(self.manifest.model_sha256, stamps(model))
        try:
            if file.read_text() == now:
                return self.manifest.model_sha256
        except (OSError, ValueError):
            pass  # the file only saves time
        sha256 = weights_sha256(model)
        if sha256 == self.manifest.model_sha256:
            with suppress(UserError):  # a read-only store, or a full disk
                write_whole(file, now)
        return sha256

    def belongs_to(self, model_sha256: str) -> None:
        """Raise UserError if this store was packed from another model."""
        if self.manifest.model_sha256 != model_sha256:
            raise UserError(
                f"The experts in {self.folder} were packed from another model "
                f"({self.manifest.model_sha256[:12]}, this one is {model_sha256[:12]}); pack this model."
            )

    def fits(self, facts: dict) -> None:
        """Raise UserError if the model's facts (`packing.facts_of`) differ from this store's. They depend on
        its config.json, which the hash of the weights does not cover."""
        self.belongs_to(facts["model_sha256"])
        for name, its in facts.items():
            mine = getattr(self.manifest, name)
            if mine != its:
                said = "" if name == "pieces" else f" ({mine}, the model's {its})"
                raise UserError(
                    f"The {NAMES[name]} of {self.folder} is not that of this model{said}; {self._again}."
                )
