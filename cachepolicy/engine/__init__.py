"""The engine attaches a `Plan` to an `nn.Module` as a `Run`: hooks, clock, sessions, histories and signals."""

try:
    import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = '`torch` is not installed, and a model needs it: pip install "cachepolicy[torch]"'
    raise ModuleNotFoundError(message, name="torch") from error
