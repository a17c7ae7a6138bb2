"""The skeleton of a model that is known by its configuration alone: built on the meta device, without weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cachepolicy.diagnostics import PolicyError
from cachepolicy.skeleton import FILE_LIMIT, Skeleton, from_json

DENOISERS = ("transformer", "unet", "transformer_2", "dit", "prior", "decoder")
"""The folders of a pipeline that may hold its denoiser; the first that is there counts."""


def read_model(path: str | os.PathLike[str]) -> Skeleton:
    """The skeleton that a file or folder describes.

    `path` is a diffusers `config.json`, the folder of a model or of a pipeline (its denoiser counts), or a skeleton
    that was written by `skeleton.write`. Only a configuration needs diffusers and torch.

    Raises:
        PolicyError: E210, nothing there can be read, or it describes no model.
        ModuleNotFoundError: a configuration is given and diffusers is not installed.
    """
    file = _config_file(Path(path))
    try:
        with file.open("rb") as opened:
            content = opened.read(FILE_LIMIT + 1)
        config = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it holds no JSON"
        raise PolicyError.of("E210", f"`{file}` cannot be read: {reason}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        return from_json(content)
    return _built(config, str(file))  # pyright: ignore[reportUnknownArgumentType]


def _config_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for folder in (path, *(path / name for name in DENOISERS)):
        if (folder / "config.json").is_file():
            return folder / "config.json"
    raise PolicyError.of("E210", f"`{path}` holds no `config.json` of a model")


def _built(config: Mapping[str, Any], shown: str) -> Skeleton:
    import diffusers
    import torch
    from diffusers.models.modeling_utils import ModelMixin

    from cachepolicy.modules import describe

    name = config["_class_name"]
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    # The name comes from a file: nothing but a model class of diffusers is ever called.
    if not isinstance(found, type) or not issubclass(found, ModelMixin):
        raise PolicyError.of("E210", f"`{shown}`: diffusers {diffusers.__version__} has no model class `{name}`")
    try:
        with torch.device("meta"):
            build: Any = found
            return describe(build.from_config(dict(config)))
    except PolicyError:
        raise
    except Exception as error:
        raise PolicyError.of("E210", f"`{shown}`: no `{name}` can be built from it: {error}") from error
