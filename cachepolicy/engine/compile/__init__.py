"""Policies under `torch.compile`."""
