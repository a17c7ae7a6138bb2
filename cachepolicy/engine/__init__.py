"""From a `Plan` and an `nn.Module` to a `Run`: hooks, the clock, sessions, histories and signals."""
