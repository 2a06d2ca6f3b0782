"""Load weights from a file, and continue a training in other formats.

Source of the latter: arXiv 2311.18587, continuous 16-bit training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign.errors import TaskError, suggest
from assign.formats.rows import Format
from assign.optim.masters import has_extra_bits, joined_checkpoint
from assign.plan.persistent_state import buffer_format, master_format, parameter_format
from assign.plan.plan import Assignment
from assign.tasks.task import Task
from assign.training import checkpoints


def load_weights(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Fill a model from a file that ``assign train --checkpoint`` or ``torch.save`` of a ``state_dict`` wrote.

    Masters in the file that have extra bits are joined with them.

    Args:
        path: of the file.
        model: gets the weights, in place.
        optimizer: gets its state, if the file has one.
    Raises:
        TaskError: the file cannot be read or belongs to another model; or it has extra bits, and no optimizer is given.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        state = checkpoints.read(path, device)
        weights, states = state, None
        if isinstance(state.get("model"), Mapping):
            weights, states = state["model"], state.get("optimizer")
        if states is not None and has_extra_bits(states):
            weights, states = _join(weights, states, model, optimizer)
        model.load_state_dict(weights)
        if optimizer is not None and states is not None:
            optimizer.load_state_dict(states)
    except FileNotFoundError as error:
        close = suggest(path.name, (file.name for file in path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise TaskError(
            f"there is no checkpoint {path}{f'; nearest: {close}' if close else ''}. "
            "Give a file that 'assign train --checkpoint' or torch.save(model.state_dict(), …) wrote."
        ) from error
    except checkpoints.UNREADABLE as error:
        raise TaskError(
            f"the checkpoint {path} does not fit this model: {str(error).strip()}\n"
            "  Give a file that 'assign train --checkpoint' or torch.save(model.state_dict(), …) wrote for this task."
        ) from error


def _join(
    weights: Mapping[str, Tensor], states: Mapping[str, Any], model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if optimizer is None:
        raise TaskError(
            "its masters have extra bits in the state of its optimizer, in the order of the optimizer's parameters, "
            "and no optimizer was given. Give one, or a file with assign.optim.widened_weights(model, optimizer)."
        )
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return joined_checkpoint(weights, states, order)


def continue_from(task: Task, model: nn.Module, plan: Assignment | None, weights: Path) -> dict[int, Any]:
    """Fill ``model`` from an fp32 training; return the states of that training's optimizer, if the file has them.

    Raises:
        TaskError: the file cannot be used, or a master or buffer of the plan cannot represent its values.
    """
    optimizer = task.make_optimizer(model)
    load_weights(weights, model, optimizer)
    entries = plan.entries if plan else {}
    stored: list[tuple[str, Tensor, str, Format]] = [
        (key, parameter, "master", parameter_format(master_format(entries, key)))
        for key, parameter in model.named_parameters()
    ]
    floating = ((key, buffer) for key, buffer in model.named_buffers() if buffer.is_floating_point())
    stored += [(key, buffer, "stored form", buffer_format(entries, key)) for key, buffer in floating]
    for key, tensor, what, fmt in stored:
        largest = float(tensor.detach().abs().amax()) if tensor.numel() else 0.0
        if largest >= fmt.overflow_threshold:
            raise TaskError(
                f"{weights}: {key!r} holds {largest:.4g}, but its {what} is {fmt.name}, whose largest "
                f"value is {fmt.max_value:g}.\n"
                f"  Give a plan with a wider master for it; 'assign audit' shows all such weights."
            )
    states: dict[int, Any] = optimizer.state_dict()["state"]
    return states


def load_states(optimizer: torch.optim.Optimizer, states: dict[int, Any]) -> None:
    """Give an optimizer the states of another one of the same kind; its options do not change."""
    options: Any = {} if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict else {"lossy": True}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]}, **options)
