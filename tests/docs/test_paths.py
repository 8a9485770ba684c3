"""What the documents point at is there: files, folders, links and names. And each figure is the one in its raw file."""

from __future__ import annotations

import json
import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

import longspan as ls
from longspan.lowering import masked
from longspan.memory import arena
from longspan.testing import cases
from longspan.tools.demo.run import DEFAULT_TOKENS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
HOMES = (ROOT, ROOT / "core" / "longspan", ROOT / "plugins", ROOT / "plugins" / "longspan_plugins")
"""Where a path in a document may start, beside the document's own folder."""
READERS = {"acme_longspan.py", "train.py", "test_conformance.py"}
"""Files that a reader writes."""
PATH = re.compile(r"(?<![\w./<$~-])(?:[\w-][\w.-]*/)+(?:[\w.-]*\w)?|(?<![\w./-])[\w-]+\.(?:py|md|toml|json|txt|c|h)\b")
NO_PATH = re.compile(r"[\d/]+|\w/\w")
NAME = re.compile(r"(?<![\w./-])(?:longspan|ls)(?:\.[a-zA-Z_]\w*)+(?![\w/-])")
FIGURE = re.compile(r"\| (?P<shown>[\d,]+(?:\.\d+)?)[^|]*\| \[[^]]*\]\((?P<file>[^)]+)\): `(?P<keys>[^`]+)` \|")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def paths(text):
    text = re.sub(r"https?://[^\s)]+", "", text)
    return sorted({word for word in PATH.findall(text) if not NO_PATH.fullmatch(word)})


def is_there(word, document):
    if any((home / word).exists() for home in (*HOMES, document.parent)) or word in READERS:
        return True
    return "/" not in word and any(True for home in (document.parent, ROOT / "core") for _ in home.rglob(word))


def name_is_there(name):
    try:
        reduce(getattr, name.split(".")[1:], ls)
    except AttributeError:
        try:
            import_module(name)
        except ImportError:
            return False
    return True


@each_document
def test_every_path_and_link_leads_somewhere(document):
    text = document.read_text(encoding="utf-8")
    missing = [word for word in paths(text) if not is_there(word, document)]
    missing += [
        link for link in re.findall(r"\]\((?!https?://)([^)#]+)", text) if not (document.parent / link).exists()
    ]
    assert not missing, f"{document.relative_to(ROOT)} points at {', '.join(missing)}"


@each_document
def test_every_name_of_ours_exists(document):
    missing = [name for name in NAME.findall(document.read_text(encoding="utf-8")) if not name_is_there(name)]
    assert not missing, f"{document.relative_to(ROOT)} names {', '.join(missing)}"


def test_a_path_and_a_name_that_are_not_there_are_found():
    text = (
        "see `lowering/nowhere.py`, nowhere.py, docs/none/ and `spec/problem.py` at https://x.org/a/b.py; 2048/1, q/k"
    )
    assert paths(text) == ["docs/none/", "lowering/nowhere.py", "nowhere.py", "spec/problem.py"]
    assert [word for word in paths(text) if not is_there(word, ROOT / "README.md")] == paths(text)[:3]
    assert name_is_there("longspan.testing.oracle") and not name_is_there("longspan.nowhere")


def test_figures_are_those_of_the_raw_files():
    document = ROOT / "docs" / "design.md"
    figures = list(FIGURE.finditer(document.read_text(encoding="utf-8")))
    assert len(figures) >= 5
    for figure in figures:
        raw = json.loads((document.parent / figure["file"]).read_text(encoding="utf-8"))
        value = reduce(lambda held, key: held[key], figure["keys"].split(" > "), raw)
        shown = figure["shown"].replace(",", "")
        assert f"{value:.{len(shown.partition('.')[2])}f}" == shown, figure[0]


@pytest.mark.parametrize(
    ("document", "words", "value"),
    [
        ("docs/hooks.md", "from {} MiB on", arena.THRESHOLD // 2**20),
        ("docs/design.md", "slabs of {:,} queries", masked.ROWS),
        ("README.md", "{:,} tokens of it", DEFAULT_TOKENS),
        ("docs/write_a_backend.md", "{:,} keys or queries", cases.LONG),
    ],
)
def test_figures_are_those_of_the_code(document, words, value):
    text = " ".join((ROOT / document).read_text(encoding="utf-8").split())
    assert words.format(value) in text
