"""`longspan plot`: what the picture shows, and what the command says."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import longspan as ls
from longspan.testing import visible
from longspan.tools.cli import main
from longspan.tools.cli.plot import FULL, PARTIAL, WHITE, cell_blocks, dilated_heads, dilated_shares, picture

COLOURS = {"full": torch.tensor(FULL), "partial": torch.tensor(PARTIAL), "nothing": torch.tensor(WHITE)}


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def test_a_picture_has_a_cell_a_block_where_there_are_few():
    image = picture(ls.local_blocks(12, 0, 8).csr(30)[0])
    names = [[next(name for name, c in COLOURS.items() if torch.equal(cell, c)) for cell in row] for row in image]
    partial, none = "partial", "nothing"
    assert names == [
        [partial, none, none, none],
        [partial, partial, none, none],
        [partial, partial, partial, none],
        [none, partial, partial, partial],
    ]
    assert torch.equal(picture(ls.strided_blocks(2, 8).csr(16)[0])[0, 0], COLOURS["full"])


def test_a_picture_of_a_million_tokens_stays_small():
    layout = (ls.local_blocks(300_000) | ls.global_blocks(1)).csr(2**20)[0]
    image = picture(layout, cells=100)
    assert image.shape == (100, 100, 3)
    assert cell_blocks(layout, cells=100) == 82
    assert torch.equal(image[50, 40], COLOURS["full"])
    assert torch.equal(image[10, 90], COLOURS["nothing"])
    faint = image[90, 0]  # one global block of the 82 in each row
    assert not torch.equal(faint, COLOURS["nothing"])
    assert (faint >= COLOURS["partial"]).all()


def test_the_command_draws(cli, tmp_path):
    pytest.importorskip("matplotlib", reason="longspan[plot] is not installed")
    for name, arguments in {
        "one.png": ("blocks:16:local:20,0|global:0", "--tokens", 200),
        "two.svg": ("blocks:16:heads(local:20,0;strided:3;strided:3)", "--tokens", 200, "--causal"),
        "three.png": ("window:20,4", "--tokens", 200, "--block-size", 16, "--heads", 2),
    }.items():
        code, out, err = cli("plot", *arguments, "--output", tmp_path / name)
        assert (code, err) == (0, "")
        assert "BlockCSR 200 x 200 tokens" in out and "written to" in out
        assert (tmp_path / name).stat().st_size > 1000
    code, out, _ = cli(
        "plot", "blocks:16:heads(local:20,0;all)", "--tokens", 64, "--json", "--output", tmp_path / "j.png"
    )
    data = json.loads(out)
    assert code == 0 and data["tokens"] == 64
    assert [row["heads"] for row in data["layouts"]] == [[0], [1]]
    assert data["layouts"][1] == {"heads": [1], "blocks": 16, "full": 16, "masks": 0, "density": 1.0, "bytes": 168}


def test_dilated_is_drawn_for_each_kind_of_head(cli, tmp_path):
    pytest.importorskip("matplotlib", reason="longspan[plot] is not installed")
    given = ("--tokens", 150, "--block-size", 16, "--json", "--output", tmp_path / "d.png")
    code, out, err = cli("plot", "dilated:16/1,64/3", *given)
    found = json.loads(out)
    assert (code, err) == (0, "") and [row["heads"] for row in found["layouts"]] == [[0], [1], [2]]
    assert (tmp_path / "d.png").stat().st_size > 1000
    seen = visible(ls.Dilated((16, 64), (1, 3)), 3, 150, 150, is_causal=False) > 0
    assert [row["density"] for row in found["layouts"]] == pytest.approx(
        seen.double().mean((-1, -2)).flatten().tolist()
    )
    code, out, _ = cli("plot", "dilated:16/1,64/3:grouped", *given, "--heads", 5, "--causal")
    assert [row["heads"] for row in json.loads(out)["layouts"]] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("pattern", "heads"),
    [
        (ls.Dilated((16, 64), (1, 3)), 6),
        (ls.Dilated((16, 64, 10**6), (1, 2, 4), heads="grouped"), 5),
        (ls.Dilated((24, 50), (3, 5), offset="block"), 7),
    ],
)
def test_the_shares_of_a_dilated_pattern_are_those_of_its_pairs(pattern, heads, causal):
    tokens, cell, cells = 150, 16, 10
    size = torch.full((cells,), 16.0)
    size[-1] = 6
    seen = torch.zeros(heads, cells * cell, cells * cell)
    seen[:, :tokens, :tokens] = (visible(pattern, heads, tokens, tokens, is_causal=causal) > 0).view(heads, tokens, -1)
    counted = seen.view(heads, cells, cell, cells, cell).sum((2, 4)) / (size[:, None] * size)
    drawn = dilated_heads(pattern, heads)
    assert sorted(head for own in drawn for head in own) == list(range(heads))
    for own, branches in drawn.items():
        for head in own:
            torch.testing.assert_close(dilated_shares(branches, tokens, cell, causal), counted[head])


@pytest.mark.parametrize(
    ("name", "words"), [("picture.xyz", "--output: got "), ("nowhere/picture.png", "No such file or directory")]
)
def test_a_file_that_cannot_be_written(cli, tmp_path, name, words):
    pytest.importorskip("matplotlib", reason="longspan[plot] is not installed")
    code, out, err = cli("plot", "window:5,0", "--tokens", 64, "--output", tmp_path / name)
    assert (code, out) == (2, "")
    assert words in err and "Next: " in err


def test_without_matplotlib_the_command_says_what_to_install(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = cli("plot", "window:5,0", "--tokens", 64, "--output", tmp_path / "picture.png")
    assert (code, out) == (2, "")
    assert "pip install 'matplotlib>=3.8'" in err


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("topk_blocks:4:16", "pattern: got 'topk_blocks:4:16'"),
        ("dilated:8/1,9/1,9/1,9/1:grouped", "4 branches and 3 heads"),
        ("blocks:16:heads(all;all)", "layouts for 2 heads, with 3"),
    ],
)
def test_patterns_that_cannot_be_drawn(cli, tmp_path, pattern, words):
    code, out, err = cli("plot", pattern, "--tokens", 64, "--heads", 3, "--output", tmp_path / "picture.png")
    assert (code, out) == (2, "")
    assert words in err
