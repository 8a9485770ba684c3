"""Everything that `Capabilities` claims, checked against the float64 oracle; everything else must be refused."""

from longspan.testing import BackendConformance


class TestAcme(BackendConformance):
    """One line is all: the cases are generated from the backend's own declaration."""

    backend = "acme"
