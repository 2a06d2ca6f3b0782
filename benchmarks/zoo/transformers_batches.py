"""A batch for a model of transformers, from the signature of its forward pass and its configuration."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 12
"""Tokens of a text."""


def batch(model: nn.Module, known: dict[str, Any], *, second: bool = False) -> dict[str, Any]:
    """Two examples.

    Args:
        model: Tells by ``main_input_name``, ``input_modalities`` and the signature of ``forward`` what it takes.
        known: Inputs that names do not tell: they are taken as they are, and None leaves one out.
        second: The other layout where names do not tell: audio features [batch, features, frames], waves with a
            channel, images with a dimension for several of them.
    """
    takes = inspect.signature(model.forward).parameters
    required = {
        key for key, each in takes.items() if each.default is each.empty and each.kind == each.POSITIONAL_OR_KEYWORD
    }
    main = model.main_input_name
    wanted = {*required, *((main,) if isinstance(main, str) else main), *_of_modalities(model)} & set(takes)
    wanted -= set(known)
    given = {key: value for key, value in known.items() if value is not None}
    if "pixel_values" in wanted:
        given |= _images(model, takes)
        if second and given["pixel_values"].ndim == 4:
            given["pixel_values"] = given["pixel_values"][:, None].repeat(
                1, find(model.config, "num_frames", default=1), 1, 1, 1
            )
    if "pixel_values_videos" in wanted and "pixel_values" not in given:
        given["pixel_values_videos"] = _video(model)
    if "input_values" in wanted:
        given["input_values"] = _waves(model)[:, None] if second else _waves(model)
    if "input_features" in wanted:
        given |= _features(model, takes, second)
    if "past_values" in wanted:
        given |= _series(model.config, takes)
    if "input_ids" in wanted:
        given |= _text(model, takes, given)
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes and "labels" not in takes:
        given["decoder_input_ids"] = _ids(model.config)
    if not {"labels", "decoder_input_ids"} & set(known):
        given |= _targets(model, takes, given)
    return {key: value for key, value in given.items() if known.get(key, value) is not None}


def _of_modalities(model: nn.Module) -> set[str]:
    kinds: Any = (
        model.input_modalities if isinstance(model.input_modalities, list | tuple) else (model.input_modalities,)
    )
    names = {
        "text": {"input_ids"},
        "image": {"pixel_values"},
        "audio": {"input_features"},
        "video": {"pixel_values_videos"} if "image" not in kinds else set(),
        "time": {"past_values"},
    }
    return set().union(*(names[each] for each in kinds))


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the configuration, or one of its parts, has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        value = find(part, *names) if part is not None else None
        if value is not None:
            return value
    return default


def _part(config: Any, *names: str) -> Any:
    """The first of these parts; of a configuration without them, all of it."""
    return next((part for name in names if (part := getattr(config, name, None)) is not None), config)


def _size(config: Any) -> tuple[int, int]:
    size = find(config, "image_size", "img_size", "input_size", default=64)
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def _images(model: nn.Module, takes: Any) -> dict[str, Any]:
    vision = _part(model.config, "vision_config", "image_config")
    channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    if "image_grid_thw" in takes:
        patch = find(vision, "patch_size", "spatial_patch_size", default=14)
        width = channels * patch**2 * find(vision, "temporal_patch_size", default=1)
        return {"pixel_values": torch.randn(2 * 16, width), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    height, width = _size(vision)
    if "image_sizes" in takes and "image_num_patches" not in takes and hasattr(model.config, "image_grid_pinpoints"):
        pixels = torch.randn(2, 2, channels, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]] * 2)}
    if "pixel_attention_mask" in takes and "text" in model.input_modalities:
        return {"pixel_values": torch.randn(2, 1, channels, height, width)}
    if "image" not in model.input_modalities and "video" in model.input_modalities:
        frames = find(model.config, "num_frames", default=4)
        return {"pixel_values": torch.randn(2, frames, channels, height, width)}
    found = {"pixel_values": torch.randn(2, channels, height, width)}
    if _needs_sizes(model):
        found["image_sizes"] = torch.tensor([[height, width]] * 2)
    return found


def _needs_sizes(model: nn.Module) -> bool:
    make = _maker(model, "image")
    known = inspect.signature(make).parameters.get("image_sizes") if make else None
    return known is not None and known.default is known.empty


def _video(model: nn.Module) -> Tensor:
    height, width = _size(model.config)
    frames = find(model.config, "num_frames", "frames_per_clip", "video_length", default=4)
    return torch.randn(2, frames, find(model.config, "num_channels", "in_chans", default=3), height, width)


def _waves(model: nn.Module) -> Tensor:
    config = model.config
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        return torch.randn(2, config.max_length, config.num_mel_bins)
    return torch.randn(2, 6400)


def _features(model: nn.Module, takes: Any, frames_last: bool) -> dict[str, Any]:
    audio = _part(model.config, "audio_config", "encoder_config")
    widths = ("num_mel_bins", "feature_projection_input_dim", "input_feat_size", "input_feat_per_channel", "input_dim")
    width = find(audio, *widths, "input_size", default=80)
    frames = 2 * audio.max_source_positions if hasattr(audio, "max_source_positions") else 128
    shape = (2, width, frames) if frames_last else (2, frames, width)
    found: dict[str, Any] = {"input_features": torch.randn(shape)}
    for key in ("input_features_mask", "feature_attention_mask"):
        if key in takes:
            found[key] = torch.ones(2, frames, dtype=torch.long)
    if "input_ids" not in takes and "attention_mask" in takes:
        found["attention_mask"] = torch.ones(2, frames, dtype=torch.long)
    return found


def _series(config: Any, takes: Any) -> dict[str, Any]:
    length = config.context_length + max(getattr(config, "lags_sequence", None) or [0])
    channels = getattr(config, "num_input_channels", None)
    tail = (channels,) if channels else ()
    found: dict[str, Any] = {"past_values": torch.randn(2, length, *tail)}
    ahead = find(config, "prediction_length", "horizon_length", default=4)
    if "past_time_features" in takes:
        times = config.num_time_features
        found["past_time_features"] = torch.randn(2, length, times)
        found["future_time_features"] = torch.randn(2, ahead, times)
        found["past_observed_mask"] = torch.ones(2, length, *tail)
    if "future_values" in takes:
        found["future_values"] = torch.randn(2, ahead, *tail)
    return found


def _ids(config: Any, length: int = WORDS) -> Tensor:
    words = find(config, "vocab_size", default=100)
    text = config.get_text_config()
    words = getattr(text, "vocab_size", None) or words
    return torch.randint(min(4, words - 1), min(100, words), (2, length))


def _text(model: nn.Module, takes: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Token ids, with as many places for each image or sound as the model makes of it."""
    parts = []
    for kind in ("image", "audio", "video"):
        token = find(model.config, f"{kind}_token_id", f"{kind}_token_index")
        count = _places(model, kind, given)
        if token is not None and count:
            parts.append(torch.full((2, count // 2), token))
    parts.append(_ids(model.config))
    ids = torch.cat(parts, 1)
    found: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in takes and "attention_mask" not in given:
        found["attention_mask"] = torch.ones_like(ids)
    if "bbox" in takes:
        found["bbox"] = torch.tensor([1, 2, 11, 12]).expand(*ids.shape, 4).clone()
    if len(parts) > 1:
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in takes:
                found[key] = (ids >= 100).long()
    return found


def _maker(model: nn.Module, kind: str) -> Any:
    """The method that makes features of images, sounds or videos."""
    name = f"get_{kind}_features"
    return getattr(getattr(model, "model", None), name, None) or getattr(model, name, None)


def _places(model: nn.Module, kind: str, given: dict[str, Any]) -> int:
    make = _maker(model, kind)
    if make is None:
        return 0
    takes = inspect.signature(make).parameters
    known = {key: value for key, value in given.items() if key in takes}
    if not known:
        return 0
    with torch.no_grad():
        found = make(**known)
    found = getattr(found, "pooler_output", found)
    tensors = found if isinstance(found, list | tuple) else [found]
    return sum(each.numel() // each.shape[-1] for each in tensors if each is not None)


def _targets(model: nn.Module, takes: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Labels, by what the class is for."""
    name = type(model).__name__
    if "start_positions" in takes and "labels" not in takes:
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    if "return_loss" in takes and "labels" not in takes:
        return {"return_loss": True}
    if "mask_labels" in takes:
        return _masks(model, takes, given)
    if "labels" not in takes or "Depth" in name or "Backbone" in name:
        return {}
    if any(each in name for each in ("Detection", "ForSegmentation", "InstanceSegmentation")):
        return {"labels": [_boxes(given, "Segm" in name) for _ in range(2)]}
    if "SemanticSegmentation" in name:
        height, width = given["pixel_values"].shape[-2:]
        return {"labels": torch.randint(0, 2, (2, height, width))}
    if "CTC" in name or "RNNT" in name or "TDT" in name:
        return {"labels": torch.randint(4, 20, (2, 4))}
    if "TokenClassification" in name:
        return {"labels": torch.randint(0, 2, given["input_ids"].shape)}
    if "Classification" in name or "Classifier" in name:
        return {"labels": torch.tensor([0, 1])}
    if "input_ids" in given and not ("decoder_input_ids" in takes and model.config.is_encoder_decoder):
        ids = given["input_ids"]
        return {"labels": torch.where(ids >= 100, -100, ids)}
    if "decoder_input_ids" in takes or "CausalLM" in name or "Generation" in name or "TextRecognition" in name:
        return {"labels": _ids(model.config)}
    return {}


def _masks(model: nn.Module, takes: Any, given: dict[str, Any]) -> dict[str, Any]:
    masks = [(torch.rand(2, *given["pixel_values"].shape[-2:]) > 0.5).float() for _ in range(2)]
    found: dict[str, Any] = {"mask_labels": masks, "class_labels": [torch.tensor([0, 1])] * 2}
    if "task_inputs" in takes:
        found |= {
            "task_inputs": _ids(model.config, 8),
            "text_inputs": _ids(model.config, 8)[:, None].repeat(1, 3, 1),
        }
    return found


def _boxes(given: dict[str, Any], masks: bool) -> dict[str, Tensor]:
    found = {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.4, 0.4, 0.3, 0.3], [0.6, 0.5, 0.2, 0.4]])}
    if masks:
        found["masks"] = (torch.rand(2, *given["pixel_values"].shape[-2:]) > 0.5).float()
    return found
