"""A model that is known by its configuration alone: built on the meta device, without weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachepolicy.diffusers.denoisers import DENOISERS
from cachepolicy.errors import PolicyError
from cachepolicy.planning.cost_model import Work
from cachepolicy.planning.module_tree import MODULE_TREE_LIMIT, Skeleton, tree_from_json

if TYPE_CHECKING:
    from cachepolicy.tools.example_inputs import Picture


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model as its configuration says; without one (a skeleton file) nothing but its modules is known."""

    skeleton: Skeleton
    class_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    model: Any = field(default=None, repr=False)

    def work(self, picture: Picture, shapes: Mapping[str, Any] | None = None) -> Work:
        """The FLOPs of one call for a picture, counted on the meta device; `shapes` are those of its arguments.

        Raises:
            PolicyError: E212, how the class is called is not known, or its forward needs data.
        """
        import torch

        from cachepolicy.tools.example_inputs import arguments_from, example_arguments
        from cachepolicy.tools.flops import count

        if self.class_name is None:
            raise PolicyError.of("E212", f"`{self.skeleton.name}` is known by its modules only, so nothing is counted")
        call = arguments_from(shapes) if shapes else example_arguments(self.class_name, self.config, picture)
        try:
            with torch.device("meta"):
                flops = count(self.model, **call)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise PolicyError.of(
                "E212",
                f"`{self.class_name}` does not run on these shapes without data: {reason}",
                help="its FLOPs are not counted; everything else is",
            ) from error
        return Work(flops.total, dict(flops.modules), flops.outputs)


def read_model(path: str | os.PathLike[str]) -> Blueprint:
    """The model that a file or folder describes.

    `path` is a diffusers `config.json`, the folder of a model or of a pipeline (its denoiser counts), or a skeleton
    that was written by `skeleton.write`. Only a configuration needs diffusers and torch.

    Raises:
        PolicyError: E210, nothing there can be read, or it describes no model.
        ModuleNotFoundError: a configuration is given and diffusers is not installed.
    """
    file = _config_file(Path(path))
    content, config = _read(file)
    if not isinstance(config, dict) or "_class_name" not in config:
        return Blueprint(tree_from_json(content))
    return _built(config, str(file))  # pyright: ignore[reportUnknownArgumentType]


def is_model(path: str | os.PathLike[str]) -> bool:
    """True where a path looks like a model and not like a policy: a folder, or JSON of a configuration or skeleton."""
    where = Path(path)
    if where.is_dir():
        return True
    if where.suffix != ".json" or not where.is_file():
        return False
    try:
        _, data = _read(where)
    except PolicyError:
        return False
    return isinstance(data, dict) and ("_class_name" in data or "modules" in data)


def _read(file: Path) -> tuple[bytes, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(MODULE_TREE_LIMIT + 1)
        return content, json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it holds no JSON"
        raise PolicyError.of("E210", f"`{file}` cannot be read: {reason}") from error


def _config_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    # The first folder that is there counts.
    for folder in (path, *(path / name for name in DENOISERS)):
        if (folder / "config.json").is_file():
            return folder / "config.json"
    raise PolicyError.of("E210", f"`{path}` holds no `config.json` of a model")


def _built(config: Mapping[str, Any], shown: str) -> Blueprint:
    import diffusers
    import torch
    from diffusers.models.modeling_utils import ModelMixin

    from cachepolicy.engine.introspection import describe

    name = config["_class_name"]
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    # The name comes from a file: nothing but a model class of diffusers is ever called.
    if not isinstance(found, type) or not issubclass(found, ModelMixin):
        raise PolicyError.of("E210", f"`{shown}`: diffusers {diffusers.__version__} has no model class `{name}`")
    try:
        with torch.device("meta"):
            build: Any = found
            model = build.from_config(dict(config)).eval()
            return Blueprint(describe(model), name, dict(model.config), model)
    except PolicyError:
        raise
    except Exception as error:
        raise PolicyError.of("E210", f"`{shown}`: no `{name}` can be built from it: {error}") from error
