"""Exact arithmetic in plain torch, for any device: blockwise attention, merging, dropout, non-finite values."""
