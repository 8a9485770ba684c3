"""Backends with one deliberate mistake each, of the kinds that real kernels are written with: see `table.TABLE`."""
