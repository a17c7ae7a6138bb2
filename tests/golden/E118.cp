match attention mask "1102" -> reuse
