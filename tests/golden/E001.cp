match "transfomer_blocks.*attn" evry 2 -> reuse
