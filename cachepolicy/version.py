"""The version of the installed package, or of the checkout."""

from __future__ import annotations

import importlib.metadata

try:
    __version__ = importlib.metadata.version("cachepolicy")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.1.0"
