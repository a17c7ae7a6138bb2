"""Decisions that several processes make together."""
