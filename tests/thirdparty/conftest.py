"""The wheels, built once a session, and sites to install them into."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import wheels as building
from sites import Site


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every wheel, by the name of its folder in `packages/`; under `-n`, the processes share them."""
    base = tmp_path_factory.getbasetemp()
    return building.build((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheels")


@pytest.fixture(scope="session")
def site(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Site]:
    """`site("good", "exits")`: a site with these distributions installed by pip; made once for each set."""
    made: dict[frozenset[str], Site] = {}

    def give(*names: str) -> Site:
        key = frozenset(names)
        if key not in made:
            folder = tmp_path_factory.mktemp("site")
            if names:
                building.install(wheels, names, folder)
            made[key] = Site(folder, tmp_path_factory.mktemp("state"))
        return made[key]

    return give
