"""Inputs for any architecture of transformers at toy size, guessed from what forward takes."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 256
IMAGE_TOKEN = 200  # ids above are placeholders of images, audio and video; each field gets its own
TOKENS = 8
GRID = torch.tensor([[1, 4, 4]])  # frames, rows and columns of patches of one image
Maker = Callable[[nn.Module], Any]


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes in a configuration, or in one that is inside it."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _side(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        size = (size.get("height", size.get("shortest_edge", 224)),) * 2
    size = size if isinstance(size, (list, tuple)) else (size, size)
    return tuple(max(each) if isinstance(each, (list, tuple)) else each for each in size[:2])


def _tokens(model: nn.Module) -> Tensor:
    top = min(_first(model.config, "vocab_size", default=VOCABULARY), IMAGE_TOKEN)
    return torch.arange(2 * TOKENS).reshape(2, TOKENS) % (top - 10) + 5


def _pixels(model: nn.Module) -> Tensor:
    vision = _vision(model.config)
    height, width = _side(_first(vision, "image_size", "img_size", "input_size", default=64))
    channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    return torch.randn(1, channels, height, width)


def _features(model: nn.Module) -> Tensor:
    names = ("num_mel_bins", "feature_size", "input_feat_size", "n_mels", "input_dim")
    length = 2 * _first(model.config, "max_source_positions", default=64)
    return torch.randn(1, _first(model.config, *names, default=80), min(length, 3000))


def _frames(model: nn.Module) -> Tensor:
    """Spectral features, frames first."""
    return _features(model).mT


def _frames_of_length(model: nn.Module) -> Tensor:
    return _frames(model)[:, : _first(model.config, "max_length", default=64)]


def _frames_of_first_weight(model: nn.Module) -> Tensor:
    return torch.randn(1, 64, _first_weight(model)[0].numel())


def _waveform(model: nn.Module) -> Tensor:
    return torch.randn(1, 4000)


def _video(model: nn.Module) -> Tensor:
    frames = _first(model.config, "num_frames", "frames_per_clip", default=4)
    return _pixels(model).unsqueeze(1).expand(-1, frames, -1, -1, -1).clone()


def _first_weight(model: nn.Module) -> Tensor:
    """Of the linear or convolution that the model's (vision) tower begins with."""
    names = ("visual", "vision_tower", "vision_model")
    towers = [module for name, module in model.named_modules() if name.endswith(names)]
    modules = (towers or [model])[0].modules()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((module.weight for module in modules if isinstance(module, kinds)), torch.empty(1, 1))


def _patches(model: nn.Module) -> Tensor:
    """Patches of the image of ``GRID``, flattened to what the first weight reads."""
    return torch.randn(int(GRID.prod()), _first_weight(model)[0].numel())


def _series(model: nn.Module) -> Tensor:
    length = _first(model.config, "context_length", "sequence_length", "horizon_length", default=64)
    return torch.randn(2, length)


MAKERS: dict[str, Maker] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "attention_mask": lambda model: torch.ones(2, TOKENS, dtype=torch.long),
    "bbox": lambda model: torch.tensor([1, 2, 3, 4]).expand(2, TOKENS, 4),
    "pixel_values": _pixels,
    "input_values": _waveform,
    "input_features": _features,
    "past_values": _series,
}


def _of_one(maker: Maker) -> Maker:
    """One text, as there is one image."""
    return lambda model: maker(model)[:1]


def _embeddings(model: nn.Module) -> Tensor:
    return torch.randn(2, TOKENS, _first(model.config, "hidden_size", "d_model", "dim", default=64))


# Other shapes that go by the same names: channels last, videos, packed patches, one text.
ALTERNATIVES: tuple[dict[str, Maker], ...] = (
    {},
    {
        "input_ids": _of_one(_tokens),
        "decoder_input_ids": _of_one(_tokens),
        "attention_mask": _of_one(MAKERS["attention_mask"]),
        "bbox": _of_one(MAKERS["bbox"]),
        "input_features": _frames_of_first_weight,
        "input_features_mask": lambda model: torch.ones(1, 64, dtype=torch.long),
        "inputs_embeds": _embeddings,
        "hidden_states": _embeddings,
    },
    {
        "pixel_values": _video,
        "input_values": _frames_of_length,
        "input_features": _frames,
        "input_features_mask": lambda model: torch.ones(_frames(model).shape[:2], dtype=torch.long),
        "attention_mask": lambda model: torch.ones(_frames(model).shape[:2], dtype=torch.long),
    },
    {
        "pixel_values": _patches,
        "hidden_states": _patches,
        "grid_thw": lambda model: GRID,
        "image_grid_thw": lambda model: GRID,
        "merge_sizes": lambda model: torch.tensor([1]),
        "pixel_values_videos": _video,
        "input_values": lambda model: torch.randn(1, 1, 4000),
        "input_features": lambda model: _frames(model).unsqueeze(1),
    },
    {"pixel_values": _video},  # beside texts and their masks
)


def input_sets(model: nn.Module) -> Iterator[dict[str, Maker]]:
    """Guesses at what a model's forward wants, fullest first, and how each is made."""
    names = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    required = [
        name
        for name, parameter in names.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    wanted = list(dict.fromkeys([main, *required]))
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        wanted.append("decoder_input_ids")
    given = [name for name in MAKERS if name in names]
    sets = (wanted, [*wanted, "decoder_input_ids"], given, ["input_ids"], ["pixel_values"], required)
    seen: list[tuple[int, frozenset[str]]] = []
    for number, other in enumerate(ALTERNATIVES):
        makers = MAKERS | other
        for chosen in sets:
            key = (number if other.keys() & set(chosen) else 0, frozenset(chosen))
            known = all(name in makers for name in chosen)
            # A forward of ``*args, **kwargs`` does not say what it takes.
            takes = set(chosen) <= names.keys() or main not in names
            if chosen and key not in seen and known and takes and set(required) <= set(chosen):
                seen.append(key)
                yield {name: makers[name] for name in dict.fromkeys(chosen)}
