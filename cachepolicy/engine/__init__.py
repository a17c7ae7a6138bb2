"""The engine attaches a `Plan` to an `nn.Module` as a `Run`: hooks, clock, sessions, histories and signals."""
