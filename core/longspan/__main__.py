"""`python -m longspan`: the command line, where `longspan` itself is not on the path."""

from longspan.tools.cli import main

if __name__ == "__main__":
    main()
