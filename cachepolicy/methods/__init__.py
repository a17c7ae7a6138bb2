"""Policies from the settings of other tools. Neither torch nor any of the tools is imported."""
