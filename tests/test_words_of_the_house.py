"""Words that gave way to the field's: none is a name in the sources any more, but where it may still stand."""

from __future__ import annotations

import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

import longspan
import longspan_plugins

FOLDERS = [Path(package.__file__).parent for package in (longspan, longspan_plugins)]
GONE = {
    "dense segments": r"strips?|Strips?|segment_strips|window_strips",
    "a plan's reservation on the arena": r"tenancy|[Tt]enants?|[Ll]andlords?|[Aa]ccounts?",
    "flatten, unflatten": r"parcel\w*|_apart|_together",
    "offload, host tier, copy event": r"tiers|[Mm]overs?|mover_of|Mark",
    "nonfinite": r"containment",
    "fallback allocator, lease, release": r"guard|lenders?|lend|disown",
    "head ranges, canonical form, explicit blocks, primitives": r"progressions|block_form|block_given|block_leaves",
    "baselines, comparison": r"[Rr]ivals?|[Cc]ontests?|races?",
    "what they do": r"demand|settle|weigh|weighed|_offered|_owning",
}
"""By the field's words, the names that stood in their place."""
STAYS = {
    ("longspan/__init__.py", "containment"),  # the public name of old, for whoever imports it
    ("longspan/testing/pytest_plugin.py", "Mark"),  # pytest's
}


def names(source):
    """The names in Python code and in the fields of its f-strings, not those in text or comments; no `str.strip`."""
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and (before, token.string) != (".", "strip"):
            yield token.string
        elif token.type == tokenize.STRING and "f" in token.string.partition(token.string[-1])[0].lower():
            for field in re.findall(r"(?<!{){([^{}]+)", token.string):
                yield from re.findall(r"[A-Za-z_]\w*", field.replace(".strip(", ""))
        before = token.string


@cache
def sources():
    """The names of every file of the two packages."""
    paths = [(folder, path) for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]
    return {
        path.relative_to(folder.parent).as_posix(): set(names(path.read_text(encoding="utf-8")))
        for folder, path in paths
    }


def stale(found, words):
    """Those of some names that are one of these words."""
    return {name for name in found if re.fullmatch(words, name)}


@pytest.mark.parametrize("words", GONE.values(), ids=GONE)
def test_no_name_is_a_word_that_gave_way(words):
    left = {(path, name) for path, found in sources().items() for name in stale(found, words)}
    assert left - STAYS == set()


def test_a_stale_name_would_be_found():
    source = (
        'strips = f"{race} and {len(Tenant)} {x.strip()}"  # a contest\nprint("rivals", Strip.strip(), of.strips)\n'
    )
    found = set(names(source))
    assert stale(found, GONE["dense segments"]) == {"strips", "Strip"}
    assert stale(found, GONE["baselines, comparison"]) == {"race"}
    assert stale(found, GONE["a plan's reservation on the arena"]) == {"Tenant"}
    assert sources()["longspan/errors.py"] >= {"LongspanError", "nearest"}
