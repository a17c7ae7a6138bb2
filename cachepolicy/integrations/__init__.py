"""Policies inside serving engines: plugins that the engines load by their entry points."""
