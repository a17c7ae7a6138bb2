"""Models without weights, FLOPs, sampling, quality metrics and the demonstration."""
