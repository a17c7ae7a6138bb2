"""The policy language: text to `Policy` and back. Nothing here needs a model or torch."""
