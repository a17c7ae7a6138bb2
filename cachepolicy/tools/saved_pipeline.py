"""Checks the folder and the files of a pipeline before it is loaded. Nothing here imports torch or diffusers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cachepolicy._resources import POLICY_SUFFIXES
from cachepolicy._strict_json import DuplicateKeyError, load_json
from cachepolicy.errors import PolicyError

TENSOR_FILES = (".safetensors", ".pt", ".pth")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has the form `owner/name` of a hub id, and nothing on disk has that path or its parent."""
    file = Path(path)
    form = _HUB_ID.fullmatch(os.fspath(path)) and file.suffix not in (*POLICY_SUFFIXES, ".json")
    return bool(form) and not file.exists() and not file.parent.is_dir()


def hub_help(path: str | os.PathLike[str], *, only: str | None = None) -> str:
    """Return the help for a hub id in the place of a folder. `only` is a pattern of the files to download."""
    name, include = Path(path).name, f" --include {only}" if only else ""
    download = f"hf download {os.fspath(path)}{include} --local-dir {name}"
    return f"no command downloads a model: run `{download}`, and name the folder `{name}`"


def read_index(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read the `model_index.json` of a pipeline.

    Raises:
        PolicyError: The folder has none (E213).
    """
    help = "name a folder with a `model_index.json`, as `save_pretrained` of diffusers writes it"
    if not Path(folder).is_dir():
        hint = ", which looks like the hub id of a pipeline" if is_hub_id(folder) else ""
        help = hub_help(folder) if hint else help
        raise PolicyError.of("E213", f"there is no folder `{folder}`{hint}", help=help)
    try:
        index: Any = load_json((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        raise PolicyError.of("E213", f"`{folder}` holds no pipeline: {error}", help=help) from error
    except (OSError, ValueError) as error:
        raise PolicyError.of("E213", f"`{folder}` holds no pipeline", help=help) from error
    return cast("Mapping[str, Any]", index) if isinstance(index, dict) else {}


def absent_components(folder: str | os.PathLike[str], index: Mapping[str, Any]) -> list[str]:
    """Return the components that the index names and the folder does not hold."""
    return [name for name, value in index.items() if isinstance(value, list) and not (Path(folder) / name).exists()]


def require_text_encoder(
    folder: str | os.PathLike[str], index: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """Require embeddings for a pipeline that was saved without its text encoders.

    Args:
        folder: The folder of the pipeline.
        index: Its index.
        arguments: The arguments of the pipeline's call so far, without tensors from a file.

    Raises:
        PolicyError: The pipeline has text encoders, and the folder has none of them (E213).
    """
    encoders = {name for name, value in index.items() if name.startswith("text_encoder") and isinstance(value, list)}
    if encoders and encoders <= set(absent_components(folder, index)):
        prompt = "so it cannot encode the prompt" if "prompt" in arguments else "and needs the embeddings of a prompt"
        raise PolicyError.of(
            "E213", f"the pipeline in `{folder}` was saved without its text encoder, {prompt}", help=EMBEDS_HELP
        )


EMBEDS_HELP = "give the embeddings: `--embeds FILE`, a .safetensors or .pt file with tensors such as `prompt_embeds`"


def check_tensor_file(path: str | os.PathLike[str]) -> None:
    """Check the name of a file of tensors.

    Raises:
        PolicyError: It does not exist, or its suffix is unknown (E213).
    """
    file = Path(path)
    if file.suffix not in TENSOR_FILES:
        raise PolicyError.of("E213", f"`{file}` is not a file of tensors", help=f"one of {', '.join(TENSOR_FILES)}")
    if not file.is_file():
        raise PolicyError.of("E213", f"there is no file `{file}`")
