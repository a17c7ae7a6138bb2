"""Tuning: finds the policy for a model from recorded runs."""
