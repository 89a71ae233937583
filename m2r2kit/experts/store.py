"""The expert store: the experts of a model as records of one size, each brought by one read.

    STORE/manifest.json     what is in it, and the SHA-256 of each record
    STORE/block-07.bin      the experts of block 7, one record after the other
    STORE/model.json        the model's weight files as they were when their hash was last taken

A record holds gate, up and down of one expert, one after the other, padded to whole pages of 4 KiB:
reads that go past the page cache must begin and end at such a page.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from ..common import UserError
from ..model.load import weights_sha256

FORMAT = 1
PAGE = 4096  # bytes
MANIFEST, STAMPS = "manifest.json", "model.json"


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
    """What a store holds.

    Attributes:
        model_sha256: of the weight files that it was packed from (`backbone.weights_sha256`).
        family: the model's type.
        dtype: arithmetic of the model that these experts belong to, such as `float32`.
        blocks: numbers of the blocks that have experts.
        experts: E, how many each block has; `top_k` of them run for a token.
        record_bytes: of one expert, a multiple of `PAGE`.
        pieces: what a record consists of.
        sha256: for each of `blocks`, of its E records, padding included.
    """

    model_sha256: str
    family: str
    dtype: str
    blocks: tuple[int, ...]
    experts: int
    top_k: int
    record_bytes: int
    pieces: tuple[Piece, ...]
    sha256: tuple[tuple[str, ...], ...]

    @property
    def bytes_used(self) -> int:
        """Of a record without its padding."""
        return self.pieces[-1].offset + self.pieces[-1].nbytes

    @property
    def total_bytes(self) -> int:
        """Of all records."""
        return len(self.blocks) * self.experts * self.record_bytes

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "page": PAGE, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError, KeyError or TypeError where the text is none."""
        value = json.loads(text)
        if value.pop("format") != FORMAT or value.pop("page") != PAGE:
            raise ValueError("it was written by another version of this kit")
        value["pieces"] = tuple(Piece(**(p | {"shape": tuple(p["shape"])})) for p in value["pieces"])
        value["blocks"] = tuple(value["blocks"])
        value["sha256"] = tuple(tuple(block) for block in value["sha256"])
        manifest = cls(**value)
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises ValueError where the numbers do not fit each other."""
        end = 0
        for piece in self.pieces:
            size = math.prod(piece.shape) * getattr(mx, piece.dtype).size
            if piece.offset != end or piece.nbytes != size:
                raise ValueError(f"{piece.name} does not lie where it should")
            end += size
        if not end or self.record_bytes != -(-end // PAGE) * PAGE:
            raise ValueError("the size of its records is wrong")
        if not 1 <= self.top_k <= self.experts or len(self.sha256) != len(self.blocks) or not self.blocks:
            raise ValueError("its counts do not fit each other")
        if any(len(block) != self.experts for block in self.sha256):
            raise ValueError("a record has no checksum")


def file_name(block: int) -> str:
    return f"block-{block:02d}.bin"


def stamps(model: Path) -> list[list]:
    """Of each weight file of a model's folder: name, bytes, times of change, and the file's number. A file
    that was written again has others, even where somebody set its time back."""
    files = [(path.name, path.stat()) for path in sorted(model.glob("model*.safetensors"))]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for name, s in files]


class Store:
    """A store on disk. Opening it reads the manifest and looks at the sizes of the files, not into them.

    Attributes:
        verified: (block, expert) of the records that were read and had the right checksum.

    Raises:
        UserError: there is none, or it is not whole.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.verified = Path(folder), set()
        file = self.folder / MANIFEST
        if not file.exists():
            raise UserError(f"There is no expert store in {folder}; make one with `m2r2kit pack MODEL OUT`.")
        try:
            self.manifest = Manifest.from_json(file.read_text())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({error}); pack the model again.") from error
        size = self.manifest.experts * self.manifest.record_bytes
        for block in self.manifest.blocks:
            path = self.path(block)
            if not path.exists():
                raise UserError(f"{self.folder} lacks {path.name}; pack the model again.")
            if path.stat().st_size != size:
                raise UserError(f"{path} has {path.stat().st_size} bytes, not {size}; pack the model again.")

    def path(self, block: int) -> Path:
        """The file with the experts of a block."""
        return self.folder / file_name(block)

    def checksum(self, block: int, expert: int) -> str:
        return self.manifest.sha256[self.manifest.blocks.index(block)][expert]

    def damaged(self, report=None) -> list[tuple[int, int]]:
        """All (block, expert) whose record is not the one that was packed; reads the whole store.

        Args:
            report: called with the bytes of each record.
        """
        found, size = [], self.manifest.record_bytes
        for block in self.manifest.blocks:
            with self.path(block).open("rb") as file:
                for expert in range(self.manifest.experts):
                    if hashlib.sha256(file.read(size)).hexdigest() != self.checksum(block, expert):
                        found.append((block, expert))
                    if report:
                        report(size)
        return found

    def model_sha256(self, model: Path) -> str:
        """`weights_sha256` of a model's folder, read anew only if its files are not those that the store was
        packed from, or last seen with: of a large model that takes minutes."""
        file, now = self.folder / STAMPS, stamps(model)
        try:
            if json.loads(file.read_text()) == now:
                return self.manifest.model_sha256
        except (OSError, ValueError):
            pass  # it only spares time
        sha256 = weights_sha256(model)
        if sha256 == self.manifest.model_sha256:
            try:
                temporary = file.with_name(file.name + ".new")
                temporary.write_text(json.dumps(now))
                temporary.replace(file)
            except OSError:
                pass  # a store that may not be written, or a full disk
        return sha256

    def belongs_to(self, model_sha256: str) -> None:
        """Refuse, in one sentence, a model that this store was not packed from."""
        if self.manifest.model_sha256 != model_sha256:
            raise UserError(
                f"The experts in {self.folder} were packed from another model "
                f"({self.manifest.model_sha256[:12]}, this one is {model_sha256[:12]}); pack this model."
            )
