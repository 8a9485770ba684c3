"""Block-sparse patterns: rules that compose, and the blocks that they keep for one shape."""
