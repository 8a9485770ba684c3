"""What `longspan bench` measures: one module a bench, found by its name.

A bench is a module here with `NAME`, `HELP`, `add_arguments(parser)` and `run(args, on_step) -> dict`. The dictionary
is what `--json` prints, below the bench's name and the machine; ratios are of sides measured in turn in one run.
"""
