"""What a missing shared library looks like."""

raise OSError("libfoo.so: cannot open shared object file: No such file or directory")
