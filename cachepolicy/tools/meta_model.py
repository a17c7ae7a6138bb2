"""Models on the meta device, built from a configuration without weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachepolicy._strict_json import DuplicateKeyError, load_json
from cachepolicy.diffusers.denoisers import DENOISERS
from cachepolicy.diffusers.editing import EDITING_MODELS, POSITIONS, REFERENCES
from cachepolicy.diffusers.guidance import (
    BATCH_CONTEXT,
    CALL_CONTEXT,
    COND_BRANCHES,
    DISTILLED_PIPELINE,
    UNCOND_BRANCHES,
    distilled_by,
)
from cachepolicy.errors import PolicyError
from cachepolicy.planning.cost_model import Work
from cachepolicy.planning.guidance import Guidance
from cachepolicy.planning.module_tree import MODULE_TREE_LIMIT, Skeleton, tree_from_json
from cachepolicy.tools.saved_pipeline import hub_help, is_hub_id

if TYPE_CHECKING:
    from cachepolicy.tools.example_inputs import Picture


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model without weights.

    Attributes:
        skeleton: The names and kinds of its modules.
        class_name: The class of diffusers, None if only the modules are known (from a skeleton file).
        config: The configuration of the class.
        model: The `nn.Module` on the meta device, None if only the modules are known.
        guidance: How guidance runs in the model's pipeline, as far as the files show it.
        references: The class of the pipeline or model whose calls hold the tokens of reference pictures, or None.
    """

    skeleton: Skeleton
    class_name: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    model: Any = field(default=None, repr=False)
    guidance: Guidance = field(default_factory=Guidance)
    references: str | None = None

    def work(self, picture: Picture, shapes: Mapping[str, Any] | None = None) -> Work:
        """Count the FLOPs and output sizes of one call.

        Args:
            picture: The size of the picture or video.
            shapes: The shapes of the arguments by name, for a class whose call is not known; see `arguments_from`.

        Returns:
            The FLOPs in total and by module, and the bytes of the outputs of each module.

        Raises:
            PolicyError: E212, the call of the class is not known, or its forward needs data.
        """
        import torch

        from cachepolicy.tools.example_inputs import arguments_from, example_arguments
        from cachepolicy.tools.flops import count

        if self.class_name is None:
            raise PolicyError.of("E212", f"`{self.skeleton.name}` is known by its modules only, so nothing is counted")
        arguments = arguments_from(shapes) if shapes else example_arguments(self.class_name, self.config, picture)
        try:
            with torch.device("meta"):
                flops = count(self.model, **arguments)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise PolicyError.of(
                "E212",
                f"`{self.class_name}` does not run on these shapes without data: {reason}",
                help="its FLOPs are not counted; everything else is",
            ) from error
        return Work(flops.total, dict(flops.modules), flops.outputs)


def read_model(path: str | os.PathLike[str]) -> Blueprint:
    """Read the model that a file or folder describes. Only a configuration needs diffusers and torch.

    Args:
        path: A `config.json` of diffusers, the folder of a model, the folder of a pipeline (its denoiser is read), or a
            skeleton file that `module_tree.write_tree` wrote.

    Returns:
        The model.

    Raises:
        PolicyError: E210, the path cannot be read or describes no model.
        ModuleNotFoundError: The path is a configuration and diffusers is not installed.
    """
    file = _config_file(Path(path))
    content, config = _read(file)
    if not isinstance(config, dict) or "_class_name" not in config:
        return Blueprint(tree_from_json(content))
    return _build(config, str(file))  # pyright: ignore[reportUnknownArgumentType]


def is_model(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is a model and not a policy: a folder, a hub id, or a JSON configuration or skeleton."""
    file = Path(path)
    if file.is_dir() or is_hub_id(path):
        return True
    if file.suffix != ".json" or not file.is_file():
        return False
    try:
        _, data = _read(file)
    except PolicyError:
        return False
    return isinstance(data, dict) and ("_class_name" in data or "modules" in data)


def _read(file: Path) -> tuple[bytes, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(MODULE_TREE_LIMIT + 1)
        return content, load_json(content)
    except DuplicateKeyError as error:
        raise PolicyError.of("E210", f"`{file}` cannot be read: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is not JSON"
        raise PolicyError.of("E210", f"`{file}` cannot be read: {reason}") from error


def _config_file(path: Path) -> Path:
    if is_hub_id(path):
        help = hub_help(path, only="'*.json'")
        raise PolicyError.of("E210", f"there is no folder `{path}`, which looks like the hub id of a model", help=help)
    if not path.is_dir():
        return path
    for folder in (path, *(path / name for name in DENOISERS)):
        if (folder / "config.json").is_file():
            return folder / "config.json"
    raise PolicyError.of("E210", f"`{path}` holds no `config.json` of a model")


def _build(config: Mapping[str, Any], file: str) -> Blueprint:
    import diffusers
    import torch
    from diffusers.models.modeling_utils import ModelMixin

    from cachepolicy.engine.introspection import describe

    name = config["_class_name"]
    attribute = getattr(diffusers, name, None) if isinstance(name, str) else None
    # The name comes from a file, so only a model class of diffusers may be called.
    if not isinstance(attribute, type) or not issubclass(attribute, ModelMixin):
        raise PolicyError.of("E210", f"`{file}`: diffusers {diffusers.__version__} has no model class `{name}`")
    try:
        with torch.device("meta"):
            model_class: Any = attribute
            model = model_class.from_config(dict(config)).eval()
        # This imports pipelines, some of whose modules hold tensors, which must not be made on the meta device.
        pipeline = _Pipeline.beside(Path(file))
        guidance = _guidance(model.config, pipeline)
        references = name if name in EDITING_MODELS else pipeline.name if pipeline.edits else None
        return Blueprint(describe(model), name, dict(model.config), model, guidance, references)
    except PolicyError:
        raise
    except Exception as error:
        raise PolicyError.of("E210", f"`{file}`: no `{name}` can be built from it: {error}") from error


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """The pipeline whose folder holds a model.

    Attributes:
        entries: The entries of its `model_index.json`.
        name: The name of its class.
        source: The source of the calls of its instances; empty if diffusers has no such class.
    """

    entries: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""
    source: str = ""

    @classmethod
    def beside(cls, config: Path) -> _Pipeline:
        """Return the pipeline of a model's `config.json`. Its entries are empty if there is none."""
        import diffusers

        index = config.parent.parent / "model_index.json"
        entries: Any = _read(index)[1] if index.is_file() else {}
        name = entries.get("_class_name")
        pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
        # The index names any class. Only one that defines calls of its instances has a source to read.
        call = getattr(pipeline, "__call__", None) if isinstance(pipeline, type) else None  # noqa: B004
        if not isinstance(name, str) or not inspect.isfunction(call):
            return cls(entries)
        return cls(entries, name, inspect.getsource(call))

    @property
    def edits(self) -> bool:
        """True if its calls hold the tokens of reference pictures."""
        return bool(REFERENCES.search(self.source)) and bool(POSITIONS.search(self.source))


def _guidance(config: Mapping[str, Any], pipeline: _Pipeline) -> Guidance:
    """Return how guidance runs, from the model's config, and from the source of the pipeline class beside it."""
    distilled = distilled_by(config)
    if distilled is None and pipeline.entries.get(DISTILLED_PIPELINE) is True:
        distilled = DISTILLED_PIPELINE
    if distilled is not None:
        return Guidance("distilled", distilled)
    name, contexts = pipeline.name, tuple(dict.fromkeys(CALL_CONTEXT.findall(pipeline.source)))
    if COND_BRANCHES & {*contexts} and UNCOND_BRANCHES & {*contexts}:
        return Guidance("sequential", name, tuple(name for name in contexts if name in COND_BRANCHES | UNCOND_BRANCHES))
    return Guidance("batched", name) if BATCH_CONTEXT in contexts else Guidance()
