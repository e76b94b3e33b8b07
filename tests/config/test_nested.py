"""Nested dicts: differences, merging and flattening, by hand."""

from typing import Any

from nvmm.config.nested import differences, flat, merged

FIRST: dict[str, Any] = {"a": 1, "b": {"c": [1, 2], "d": None}, "only": {"x": 1}}
SECOND: dict[str, Any] = {"a": 1, "b": {"c": [1, 3], "d": 4, "e": 5}}


def test_every_leaf_that_differs_has_its_dotted_key() -> None:
    assert list(differences(FIRST, SECOND)) == [
        ("b.c", [1, 2], [1, 3]),
        ("b.d", None, 4),
        ("b.e", None, 5),
        ("only", {"x": 1}, None),
    ]
    assert not list(differences(FIRST, FIRST))


def test_lists_of_one_length_are_compared_item_by_item_where_asked() -> None:
    first, second = {"a": [{"b": 1}, 2], "c": [1]}, {"a": [{"b": 3}, 2], "c": [1, 2]}
    found = list(differences(first, second, in_lists=True))
    assert found == [("a[0].b", 1, 3), ("c", [1], [1, 2])]


def test_absent_keys_are_read_as_the_caller_says() -> None:
    defaults = {"e": 5}
    found = differences(FIRST, SECOND, get=lambda node, name: node.get(name, defaults.get(name)))
    assert "b.e" not in {key for key, *_ in found}


def test_merging_lays_changes_over_and_alters_neither() -> None:
    base = {"a": 1, "stale": 2, "b": {"c": 3, "stale": 4}, "d": {"stale": 5}}
    changes = {"b": {"c": 6, "stale": 7}, "e": {"f": 8}}
    expected = {"a": 1, "b": {"c": 6, "stale": 7}, "d": {"stale": 5}, "e": {"f": 8}}
    assert merged(base, changes, drop=("stale",)) == expected
    assert merged(base, {"b": {"c": 6}})["b"] == {"c": 6, "stale": 4}
    assert base["b"] == {"c": 3, "stale": 4}
    assert merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    # Another constructor inside has other keys; that of the dict itself is exchanged alone.
    base = {"_target_": "a", "x": 1, "form": {"_target_": "b", "y": 2}}
    assert merged(base, {"form": {"_target_": "c"}})["form"] == {"_target_": "c"}
    assert merged(base, {"form": {"_target_": "b", "z": 3}})["form"] == {
        "_target_": "b",
        "y": 2,
        "z": 3,
    }
    assert merged(base, {"_target_": "d"}) == {**base, "_target_": "d"}


def test_flattening_joins_names() -> None:
    assert dict(flat({"a": {"b": 1, "c": {"d": [2]}}, "e": 3})) == {"a.b": 1, "a.c.d": [2], "e": 3}
    assert dict(flat({"a": {"b": 1}}, "/")) == {"a/b": 1}
