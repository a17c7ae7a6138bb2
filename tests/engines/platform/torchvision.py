"""For tests: stands in for torchvision, whose wheel for CUDA cannot be imported beside a torch for CPUs.

Every name of it and of its submodules is there and means nothing: no model of the tests uses one.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

__path__: list[str] = []
__version__ = "0.28.0"


class _Named(type):
    """A class whose attributes are their own names, as those of an enum."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _name(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Named(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Submodules:
    """Finds and loads `torchvision.anything`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__getattr__ = _name


sys.meta_path.append(_Submodules())
__getattr__ = _name
