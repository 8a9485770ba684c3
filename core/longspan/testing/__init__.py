"""What a backend's author tests with: the oracle that says what the right answer is."""

from longspan.testing.oracle import oracle, visible

__all__ = ["oracle", "visible"]
