"""Places the hooks of one root model by module path, and checks them when a trajectory starts."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import nn

from cachepolicy.engine import compat
from cachepolicy.engine.class_swap import Override, intercepts, is_swapped, restore, swap
from cachepolicy.engine.hooks import SiteHandle, parameters_of
from cachepolicy.engine.profiling import timed
from cachepolicy.errors import PolicyError


class Placement:
    """The hooks on the sites of a root model.

    Adapters (LoRA) replace a module by a layer of their own and restore it later. `settle` moves the hooks accordingly.
    """

    def __init__(self, root: nn.Module, sites: Mapping[str, SiteHandle], *, profiled: bool = False) -> None:
        self._root = root
        self.profiled = profiled
        self._sites = {path: site for path, site in sites.items() if path}
        self._modules: dict[str, nn.Module] = {}
        self._lock = threading.Lock()

    def place(self) -> None:
        """Hook every site. If one fails, remove all."""
        try:
            for path, site in self._sites.items():
                self._put(path, site, self._root.get_submodule(path))
        except BaseException:
            self.lift()
            raise

    def add(self, path: str, site: SiteHandle) -> None:
        """Hook one more module."""
        with self._lock:
            self._sites[path] = site
            self._put(path, site, self._root.get_submodule(path))

    def settle(self) -> None:
        """Check that each path leads to its hooked module, and move hooks of replaced modules.

        Raises:
            PolicyError: A path no longer exists, or leads to a module of another run (E341).
        """
        with self._lock:
            for path, site in self._sites.items():
                module = self._found(path)
                if module is not self._modules.get(path):
                    self._move(path, site, module)
                elif not intercepts(module, {"__call__": self._override(module)}, site):
                    restore(module)
                    self._put(path, site, module)

    def lift(self) -> None:
        """Remove all hooks."""
        for module in self._modules.values():
            restore(module)
        self._modules.clear()

    def _found(self, path: str) -> nn.Module:
        try:
            return self._root.get_submodule(path)
        except AttributeError as error:
            raise PolicyError.of(
                "E341",
                f"the model has no `{path}` any more, which the policy was applied to",
                help="`remove` the policy and apply it to the model as it is now",
            ) from error

    def _override(self, module: nn.Module) -> Override:
        override = compat.override_of(module)
        return timed(override) if self.profiled else override

    def _move(self, path: str, site: SiteHandle, module: nn.Module) -> None:
        if is_swapped(module) and module not in self._modules.values():
            raise PolicyError.of(
                "E341",
                f"`{path}` was replaced by a module of a model that has a policy of its own",
                help="`remove` both policies and apply one",
            )
        old = self._modules.pop(path, None)
        if old is not None and old not in self._modules.values():
            restore(old)
        self._put(path, site, module)
        site.parameters = parameters_of(module)

    def _put(self, path: str, site: SiteHandle, module: nn.Module) -> None:
        swap(module, {"__call__": self._override(module)}, site)
        self._modules[path] = module
        compat.introduce(module)
