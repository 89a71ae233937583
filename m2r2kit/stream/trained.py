"""A trained stream and its tuned settings, read from disk once."""

from dataclasses import dataclass, field
from pathlib import Path

from ..common import UserError
from ..model.backbone import Backbone
from . import checkpoints
from .stream import AcceleratedStream, StreamConfig

OF_THE_FILE = ("format", "kind", "base_sha256", "weights_sha256", "config")  # keys that are not facts


@dataclass
class TrainedStream:
    """An accelerated stream (M2R2, arXiv 2502.02040) and its settings.

    Attributes:
        module: the stream, bound to a model.
        facts: tuned settings (`drafts`, `threshold`, `tree`) and the cost of training (`steps`,
            `train_seconds`).
        base_sha256: SHA-256 of the model that it was trained for, as saved; None if it was trained in this
            process.
    """

    module: AcceleratedStream = field(repr=False)  # MLX prints every layer
    facts: dict = field(default_factory=dict)
    base_sha256: str | None = None

    @classmethod
    def load(cls, backbone: Backbone, folder: str | Path, check: bool = True) -> "TrainedStream":
        """Read a folder that `save` or `m2r2kit train stream` wrote.

        Args:
            check: refuse another model than the one it was trained for; if False, `bound_to` does so later.

        Raises:
            UserError: there is none, it is damaged, or it belongs to another model.
        """
        config, text = checkpoints.read_settings(folder, "stream", StreamConfig)
        module = checkpoints.build(AcceleratedStream, backbone, config, folder, "stream")
        base = text["base_sha256"]
        checkpoints.load_weights(module, text, backbone.sha256 if check else base, folder, "stream")
        return cls(module, {k: v for k, v in text.items() if k not in OF_THE_FILE}, base)

    @property
    def backbone(self) -> Backbone:
        """The model that it is bound to."""
        return self.module._backbone

    def bound_to(self, backbone: Backbone) -> "TrainedStream":
        """This stream, bound to another view of its model.

        Raises:
            UserError: it was trained for another model.
        """
        base = self.base_sha256 or (self.backbone.sha256 if self.backbone is not backbone else None)
        if base is not None and base != backbone.sha256:
            both = f"{base[:12]}, this one is {backbone.sha256[:12]}"
            raise UserError(f"The stream was trained for another model ({both}); train one for this model.")
        if self.backbone is backbone:
            return self
        module = AcceleratedStream(backbone, self.module.config)
        module.update(self.module.trainable_parameters())
        return TrainedStream(module, self.facts, base)

    def save(self, folder: str | Path) -> None:
        """Write `stream.safetensors` and `stream.json`. Both appear, or neither.

        Raises:
            UserError: the folder cannot be written.
        """
        base = self.base_sha256 or self.backbone.sha256
        checkpoints.save(self.module, self.module.config, base, folder, "stream", **self.facts)
