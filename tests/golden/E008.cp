param every: int = 2
