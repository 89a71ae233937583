"""The accelerated residual stream p that runs beside the model's hidden state h, and its training."""

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
