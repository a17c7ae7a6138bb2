"""What happened in a run: records of each forward pass, their JSON schema, and the export to Perfetto."""
