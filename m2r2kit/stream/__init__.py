"""The paper's idea: an accelerated residual stream p beside the model's own h, and how it is trained."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "distil": "DistilConfig TeacherBatch teacher_batch",
        "evaluate": "agreement",
        "stream": "AcceleratedStream StreamConfig intervals load_stream",
        "train": "teacher_batches train_stream",
    },
)
