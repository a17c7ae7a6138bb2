"""Models on the meta device, FLOPs and bytes of a call, sampling, quality metrics and the demonstration."""
