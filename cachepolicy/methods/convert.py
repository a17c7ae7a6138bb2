"""`convert`: the text of a policy from a setting of another tool."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cachepolicy._strict_json import load_json
from cachepolicy.diffusers.configs import config_of
from cachepolicy.errors import PolicyError
from cachepolicy.language.formatter import format
from cachepolicy.methods import of_cache_dit, of_comfyui, of_programs, of_routers
from cachepolicy.methods.settings import Conversion

_LIMIT = 16 * 2**20
"""Bytes of a file that are read at most."""


def convert(setting: Any) -> str:
    """Converts a setting of another tool to a policy.

    Args:
        setting: A cache config of diffusers or of this package, a config of cache-dit, a pair of such a config and a
            calibrator's, what cache-dit's `load_configs` returns, the options of stable-diffusion.cpp as a string, the
            content of a file as a mapping, or the path of a file. Files are JSON, YAML, with the
            suffix `.txt` options of a command line, or with `.pt`, `.pth` or `.safetensors` routers of
            Learning-to-Cache, also as `{"path": FILE, "thres": THRESHOLD}`.

    Returns:
        The text of the policy. What the tool does besides stands in its comments.

    Raises:
        PolicyError: The file cannot be read (E152, E153), the setting is of no known tool (E169), a field has a wrong
            value (E161, E162), or no policy expresses it (E168).
    """
    if isinstance(setting, os.PathLike) or (isinstance(setting, str) and of_programs.OPTION not in setting):
        path = Path(cast("str", setting))
        setting = {"path": path} if path.suffix in of_routers.SUFFIXES else _read(path)
    conversion = _conversion(setting)
    notes = "".join(f"# {note}\n" for note in conversion.notes)
    return notes + format(conversion.policy())


def _conversion(setting: Any) -> Conversion:
    if isinstance(setting, tuple) and len(cast("tuple[Any, ...]", setting)) == 2:
        config, calibrator = cast("tuple[Any, Any]", setting)
        if _of_cache_dit(config):
            return of_cache_dit.of_objects(config, calibrator)
    if _of_cache_dit(cast("Any", setting)):
        return of_cache_dit.of_objects(setting)
    if isinstance(setting, Mapping):
        # YAML has keys of any type.
        values = {str(key): value for key, value in cast("Mapping[Any, Any]", setting).items()}
        if _of_cache_dit(values.get("cache_config")):
            return of_cache_dit.of_objects(values["cache_config"], values.get("calibrator_config"))
        return _of_mapping(values)
    if isinstance(setting, str):
        return of_programs.of_command_line(setting)
    return _of_diffusers(setting)


def _of_cache_dit(value: object) -> bool:
    return any(cls.__module__.startswith("cache_dit.") for cls in type(value).__mro__)


def _of_diffusers(setting: Any) -> Conversion:
    config = config_of(setting)
    if config is None:
        raise _unknown(f"`{type(setting).__name__}`")
    if isinstance(config, Conversion):
        return config
    for name in sorted(set(config.arguments()) - {"guidance"}):
        callback = "current_timestep" if name == "timestep" else name
        message = f"`{callback}_callback` of `{type(setting).__name__}` cannot be expressed by the policy"
        raise PolicyError.of("E168", message, help="a text holds no function; `enable_cache` takes the config itself")
    return Conversion(config.policy())


def _of_mapping(values: Mapping[str, Any]) -> Conversion:
    if "cache_backend" in values:
        return of_programs.of_vllm_omni(values)
    if any(name.startswith(of_programs.SGLANG) for name in values):
        return of_programs.of_sglang(values)
    if of_comfyui.is_workflow(values):
        return of_comfyui.of_workflow(values)
    if of_routers.is_setting(values):
        return of_routers.of_routers(values)
    if of_programs.is_smoothcache(values):
        return of_programs.of_smoothcache(values)
    if any(name in values for name in of_programs.XDIT):
        return of_programs.of_xdit(values)
    inner = values.get("cache_config")
    if isinstance(inner, Mapping) or of_cache_dit.KEYS & set(values):
        return of_cache_dit.of_mapping(values)
    keys = ", ".join(f"`{key}`" for key in list(values)[:5])
    raise _unknown(f"a mapping with the keys {keys}" if keys else "an empty mapping")


def _unknown(what: str) -> PolicyError:
    return PolicyError.of("E169", f"{what} is no setting of a tool that is known")


def _read(path: Path) -> Any:
    """Returns the content of a JSON or YAML file."""
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        raise PolicyError.of("E152", f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > _LIMIT:
        raise PolicyError.of("E153", f"`{path}` has more than {_LIMIT} bytes")
    if path.suffix in {".yaml", ".yml"}:
        return _yaml(path, content)
    if path.suffix == ".txt":
        return content.decode("utf-8", "replace")
    try:
        return load_json(content)
    except (ValueError, RecursionError) as error:
        reason = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise PolicyError.of("E169", f"`{path}` is no JSON: {reason}", help="YAML files end in `.yaml`") from error


def _yaml(path: Path, content: bytes) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise PolicyError.of("E169", f"reading `{path}` needs the package `pyyaml`", help="write it as JSON") from error
    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise PolicyError.of("E169", f"`{path}` is no YAML: {' '.join(str(error).split())}") from error
