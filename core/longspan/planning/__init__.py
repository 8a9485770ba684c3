"""A resolved problem made ready: hooks called once, then a bare callable. `longspan.attention` keeps such plans."""
