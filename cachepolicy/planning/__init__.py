"""From a `Policy` and the names of a model's modules to a `Plan`, and from a plan and a clock to decisions."""
