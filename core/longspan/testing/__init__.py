"""What a backend's author tests with: the oracle that says what is right, and the kit that holds a backend to it.

```python
import longspan.testing

class TestMine(longspan.testing.BackendConformance):
    backend = "mine"
```

`longspan verify mine` runs the same cases without pytest. The pytest plugin `longspan.testing.pytest_plugin` adds
`--longspan-backend`.
"""

from longspan.testing.cases import Case
from longspan.testing.certificate import Certificate, verify
from longspan.testing.kit import BackendConformance, cases_for, run_case
from longspan.testing.oracle import oracle, visible
from longspan.testing.outcome import Outcome

__all__ = [
    "BackendConformance",
    "Case",
    "Certificate",
    "Outcome",
    "cases_for",
    "oracle",
    "run_case",
    "verify",
    "visible",
]
