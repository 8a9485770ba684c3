"""A pattern becomes dense calls, blocks or a mask for one problem: values, and what they cost."""
