"""Positions, against a slow and obvious way of counting."""

from __future__ import annotations

import copy
import itertools
import pickle
from xml.etree import ElementTree

import pytest

from tests.helpers import refused
from transplant_hf import ConfigurationError
from transplant_hf.layer_map import (
    LayerMap,
    Placement,
    Splice,
    extracted_position,
    paper_layers,
    paper_position,
    trained_position,
)


def obvious_map(num_layers: int, placements: list[Placement], off: set[str]) -> list[tuple[str, int]]:
    """Write down every recipient layer, then what stands before it."""
    gone = {
        p.position + number
        for p in placements
        if p.replaces and p.name not in off
        for number in range(len(p.layer_indices))
    }
    slots: list[tuple[str, int]] = []
    for number in range(num_layers + 1):
        for placement in placements:
            if placement.position == number and placement.name not in off:
                slots += [(placement.name, index) for index in placement.layer_indices]
        if number < num_layers and number not in gone:
            slots.append(("recipient", number))
    return slots


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_every_pair_of_placements(num_layers: int) -> None:
    tried = 0
    places = itertools.product(range(num_layers + 1), (1, 2), (False, True))
    for (p, k, first_replaces), (q, m, second_replaces) in itertools.product(list(places), repeat=2):
        one = Placement("one", p, tuple(range(7, 7 + k)), first_replaces)
        two = Placement("two", q, tuple(range(3, 3 + m)), second_replaces)
        too_long = any(x.replaces and x.position + len(x.layer_indices) > num_layers for x in (one, two))
        if too_long or set(one.replaced) & set(two.replaced):
            with pytest.raises(ConfigurationError):
                Splice(num_layers, [one, two])
            continue
        splice = Splice(num_layers, [one, two])
        for off in (set(), {"one"}, {"two"}, {"one", "two"}):
            assert list(splice.layer_map(off)) == obvious_map(num_layers, [one, two], off)
            tried += 1
        assert list(splice.layer_map({"one", "two"})) == [("recipient", n) for n in range(num_layers)]
    assert tried > 20


def test_donors_at_one_position_run_in_list_order() -> None:
    splice = Splice(2, [Placement("b", 1, (0,)), Placement("a", 1, (5,))])
    assert [slot.source for slot in splice.layer_map()] == ["recipient", "b", "a", "recipient"]


def test_an_insertion_beside_a_replacement() -> None:
    """Both count the untouched recipient's layers, whatever else is transplanted."""
    splice = Splice(4, [Placement("in", 2, (9,)), Placement("re", 1, (4, 5), replaces=True)])
    assert splice.layer_map() == (("recipient", 0), ("re", 4), ("re", 5), ("in", 9), ("recipient", 3))


@pytest.mark.parametrize("position", [-1, 5, 99])
def test_position_outside(position: int) -> None:
    with refused(ConfigurationError, f"position {position}", "'law'", "0..4", "4 layers"):
        Splice(4, [Placement("law", position, (0,))])


def test_replacement_past_the_end() -> None:
    with refused(ConfigurationError, "'law'", "position 2", "outside 0..1", "4 layers", "3 are replaced"):
        Splice(4, [Placement("law", 2, (0, 1, 2), replaces=True)])
    Splice(4, [Placement("law", 1, (0, 1, 2), replaces=True)])


def test_overlapping_replacements() -> None:
    with refused(ConfigurationError, "'law'", "'code'", "recipient layer 2", "overlap"):
        Splice(4, [Placement("law", 1, (0, 1), replaces=True), Placement("code", 2, (0,), replaces=True)])


def test_map_compares_as_tuples_and_prints_a_picture() -> None:
    layer_map = Splice(3, [Placement("law", 1, (4, 5))]).layer_map()
    assert layer_map == (("recipient", 0), ("law", 4), ("law", 5), ("recipient", 1), ("recipient", 2))
    assert layer_map.sources == ("recipient", "law")
    assert layer_map.layers_of("law") == [1, 2]
    assert str(layer_map).splitlines() == [
        "layer  from",
        "    0  recipient 0",
        "    1  |  law 4",
        "    2  |  law 5",
        "    3  recipient 1",
        "    4  recipient 2",
        "5 layers run: 3 recipient, 2 law",
    ]
    assert eval(repr(layer_map), {"LayerMap": LayerMap}) == layer_map  # noqa: S307


def test_long_recipients_are_shortened_in_print() -> None:
    picture = str(Splice(80, [Placement("law", 40, (4,))]).layer_map())
    assert len(picture.splitlines()) < 16
    for line in (
        "    0  recipient 0",
        "   39  recipient 39",
        "   40  |  law 4",
        "   41  recipient 40",
        "   80  recipient 79",
    ):
        assert line in picture
    assert "81 layers run: 80 recipient, 1 law" in picture


def test_a_legend_is_printed_and_changes_nothing_else() -> None:
    bare = Splice(8, [Placement("a<b", 1, (4,))]).layer_map()
    layer_map = LayerMap(bare, [("a<b", "strength 1 & on")])
    assert layer_map == bare == tuple(bare) and hash(layer_map) == hash(bare)
    assert str(layer_map) == f"{bare}\na<b: strength 1 & on"
    assert str(copy.deepcopy(layer_map)) == str(pickle.loads(pickle.dumps(layer_map))) == str(layer_map)  # noqa: S301


def test_notebooks_show_the_same_escaped() -> None:
    layer_map = LayerMap(Splice(8, [Placement("a<b", 1, (4,))]).layer_map(), [("a<b", "strength 1 & on")])
    (picture,) = ElementTree.fromstring(f"<div>{layer_map._repr_html_()}</div>")
    assert picture.text == str(layer_map)


@pytest.mark.parametrize(
    ("num_layers", "count", "layers"),
    [(12, 3, [4, 5, 6]), (22, 3, [7, 8, 9]), (24, 3, [8, 9, 10]), (4, 3, [1, 2, 3]), (3, 3, [0, 1, 2]), (3, 1, [1]),
     (1, 1, [0]), (5, 4, [1, 2, 3, 4])],
)  # fmt: skip
def test_the_papers_layers(num_layers: int, count: int, layers: list[int]) -> None:
    assert list(paper_layers(num_layers, count)) == layers


@pytest.mark.parametrize("count", [0, -1, 5])
def test_more_layers_than_there_are(count: int) -> None:
    with refused(ConfigurationError, f"a donor of {count} layers", "a model of 4"):
        paper_layers(4, count)


def test_default_positions() -> None:
    assert [trained_position(9, 3, mode) for mode in ("insert", "replace")] == [8, 6]
    assert [trained_position(30, count) for count in (1, 3, 6, 16)] == [29, (10, 20, 29), (5, 10, 15, 20, 25, 29), 29]
    assert trained_position(30, 3, late=True) == 29 and trained_position(30, 3, "replace") == (0, 15, 29)
    assert trained_position(30, 3, "replace", late=True) == 27 and trained_position(30, 1, "replace") == 29
    assert [extracted_position(9, layers) for layers in ([2, 3, 4], [7, 8])] == [5, 9]
    assert [paper_position(num_layers) for num_layers in (2, 12, 22)] == [1, 3, 5]
