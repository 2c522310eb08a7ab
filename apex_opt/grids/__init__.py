"""Studies: one command asked of every point of a grid, on several processes or on Ray, with results kept in Parquet."""
