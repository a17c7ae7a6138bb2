match "^transformer_blocks every 2 -> reuse
