"""The `cachepolicy` command."""
