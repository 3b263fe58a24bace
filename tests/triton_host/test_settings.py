"""Tile settings: the file, and which tile a call gets."""

import json

import pytest

from glora_kernels.planning.settings import FILE, KERNELS, Tile, forced_tiles, load, nearest, rules, tile_for

SIZES = [(element, tokens, rank) for element in (2, 4) for tokens in (1, 16, 200, 5000, 10**7) for rank in (16, 32, 64)]


@pytest.mark.parametrize("architecture", load())
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_call_has_a_tile(architecture, kernel):
    for size in SIZES:
        tile = tile_for(kernel, architecture, *size)
        blocks = [block for block in (tile.tokens, tile.rows, tile.columns) if block]
        assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
        assert tile.warps in (4, 8)


def test_the_first_rule_that_fits_is_taken():
    small, large = (tile_for("fused", "sm_90", 2, tokens, 16) for tokens in (16, 17))
    assert (small.tokens, large.tokens) == (16, 64)
    assert tile_for("fused", "sm_90", 2, 16, 64) != small


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("sm_90", "sm_90"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_75", None),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx90a", None),
    ],
)
def test_nearest_older_of_the_family(architecture, expected):
    assert nearest(architecture, tuple(load())) == expected


def test_one_that_names_another_has_the_same():
    assert rules("sm_120") == rules("sm_80")
    assert json.loads(FILE.read_text())["architectures"]["sm_120"] == "sm_80"


def test_unknown_architecture():
    with pytest.raises(LookupError, match=r"settings.json: no settings for sm_70; known: \['gfx942'"):
        rules("sm_70")


def test_no_rule():
    with pytest.raises(LookupError, match="no fused tile for sm_90, 8 bytes, 5 tokens, rank 16"):
        tile_for("fused", "sm_90", 8, 5, 16)


def test_forced_tiles_end_with_the_block():
    before, forced = tile_for("fused", "sm_90", 2, 16, 16), Tile(16, 16, 16, 4, 2)
    with pytest.raises(KeyError), forced_tiles({"fused": forced}):
        assert tile_for("fused", "sm_90", 2, 16, 16) == forced
        raise KeyError
    assert tile_for("fused", "sm_90", 2, 16, 16) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=2), "expected version 1, got 2"),
        (lambda content: content["architectures"]["sm_90"].pop("fused"), "sm_90: expected rules for"),
    ],
)
def test_damaged_file(tmp_path, change, message):
    content = json.loads(FILE.read_text())
    change(content)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(file)
