"""Tasks: model, loss, data, training and evaluation; built-in or the user's own."""

from assign.tasks.batch import Batch
from assign.tasks.builtin import BUILTIN
from assign.tasks.loading import load_task
from assign.tasks.task import Metrics, Task, TaskOptions, check_device

__all__ = ["BUILTIN", "Batch", "Metrics", "Task", "TaskOptions", "check_device", "load_task"]
