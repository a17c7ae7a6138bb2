policy empty
