"""The paper's idea: an accelerated residual stream p beside the model's own h, and how it is trained."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "distil": "DistilConfig TeacherBatch cosine teacher_batch",
        "evaluate": "agreement",
        "stream": "AcceleratedStream FORMS StreamConfig intervals load_stream tau",
        "train": "teacher_batches train_stream",
    },
)
