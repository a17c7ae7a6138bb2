"""Tools for testing policies: generated policies and clocks, reference checks, and a zoo of tiny models."""

from __future__ import annotations
