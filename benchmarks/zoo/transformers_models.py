"""A tiny model of each modelling file of transformers, with a batch and its own loss."""

import copy
import functools
import importlib
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import torchvision_standin
from benchmarks.zoo.exceptions import CONFIGURATIONS, INPUTS
from benchmarks.zoo.losses import loss
from benchmarks.zoo.sizes import small
from benchmarks.zoo.transformers_batches import batch

HEADS = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "CTC",
    "RNNT", "TDT", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "IMAGE_SEGMENTATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "TIME_SERIES_PREDICTION", "DEPTH_ESTIMATION",
    "MASKED_IMAGE_MODELING", "IMAGE_TO_IMAGE", "IMAGE_MATTING", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING",
    "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "VISUAL_QUESTION_ANSWERING", "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING", "PRETRAINING", "DECISION", "BACKBONE",
)  # fmt: skip
"""Auto-mappings of transformers: a file's class is the one whose mapping comes first."""


def names() -> list[tuple[str, str]]:
    """Modelling files, as ``bert/modeling_bert``, each with one class."""
    root = Path(_transformers().__file__ or "").parent / "models"
    files = sorted(f"{each.parent.name}/{each.stem}" for each in root.glob("*/modeling_*.py"))
    return [(file, name) for file in files if not file.startswith("auto/") and (name := head(file))]


@functools.cache
def _transformers() -> Any:
    torchvision_standin.install()  # transformers asks for it wherever a model is one of timm's
    return importlib.import_module("transformers")


def _module(file: str) -> Any:
    _transformers()
    return importlib.import_module("transformers.models." + file.replace("/", "."))


def head(file: str) -> str:
    """Choose the class to try in a modelling file: one of the auto-mappings, else one with labels, else any model.

    Returns:
        Its name; "-" of a file that needs a package which is not there, nothing of a file without a model.
    """
    try:
        module = _module(file)
    except ImportError:
        return "-"
    kinds = {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind)
        and issubclass(kind, _transformers().PreTrainedModel)
        and kind.__module__ == module.__name__
        and kind.forward is not nn.Module.forward
        and not name.endswith(("PreTrainedModel", "PretrainedModel"))
    }
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for each in HEADS:
        for names in getattr(auto, f"MODEL_FOR_{each}_MAPPING_NAMES").values():
            for name in (names,) if isinstance(names, str) else names:
                if name in kinds:
                    return name
    public = [name for name in getattr(module, "__all__", kinds) if name in kinds] or list(kinds)
    labelled = [name for name in public if "labels" in inspect.signature(kinds[name].forward).parameters]
    complete = [name for name in public if re.search(r"For\w+$|Model$", name)]
    return [*labelled, *complete, *public][0] if public else ""


def build(file: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model and a batch: the first of a few sizes and layouts with which the plain step works.

    Raises:
        Exception: The first of their errors, if there is none.
    """
    kind: Any = getattr(_module(file), name)
    errors = []
    for shallow, second in itertools.product((False, True), (False, True)):
        if shallow and _widest(kind.config_class().to_dict()) > 1024:
            break
        try:
            torch.manual_seed(0)
            model = kind(_configuration(file, kind.config_class, shallow)).train()
            found = batch(model, INPUTS.get(_key(file), lambda _: {})(model.config), second=second)
            tried = loss(copy.deepcopy(model), found)
            if not tried.isfinite():
                raise ValueError("The loss of these inputs is not finite.")
            tried.backward()
            return model, found
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _key(file: str) -> str:
    return file.split("/modeling_")[1]


def _configuration(file: str, kind: Any, shallow: bool) -> Any:
    fields = small(kind().to_dict(), shallow=shallow)
    module = inspect.getsource(_module(file))
    fields = _with(fields, CONFIGURATIONS.get(_key(file), {}))
    config = kind.from_dict(_with_sections(fields) if "mrope_section" in module or "grid_thw" in module else fields)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


def _with(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    return fields | {
        key: _with(fields[key], value) if isinstance(value, dict) and isinstance(fields.get(key), dict) else value
        for key, value in others.items()
    }


def _with_sections(fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings of three axes share the eight frequencies of a small head."""
    found = {key: _with_sections(value) if isinstance(value, dict) else value for key, value in fields.items()}
    return found | {"mrope_section": [2, 3, 3]} if "rope_theta" in found and "hidden_size" not in found else found


def _widest(fields: dict[str, Any]) -> int:
    """The largest hidden size of a configuration and its parts."""
    own = [fields.get(key) for key in ("hidden_size", "d_model", "n_embd", "dim")]
    parts = [_widest(each) for each in fields.values() if isinstance(each, dict)]
    return max([0, *parts, *(each for each in own if isinstance(each, int))])
