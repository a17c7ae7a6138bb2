match "^(?!single_).*attn" every 2 -> reuse
