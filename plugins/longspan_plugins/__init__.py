"""longspan's built-in backends. They enter through the entry-point group `longspan.backends`, as anyone's do."""
