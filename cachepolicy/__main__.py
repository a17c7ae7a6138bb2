"""`python -m cachepolicy` is the `cachepolicy` command."""

from __future__ import annotations

from cachepolicy.cli.commands import main

if __name__ == "__main__":
    main(prog_name="cachepolicy")
