"""Names of layers, to read."""

import pytest

from lowbit_kernels.conversion.layer_names import alike, fold_name, join_names, name_width


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["head"], "head"),
        (["layers.0.k", "layers.1.k", "layers.2.k"], "layers.0-2.k"),
        (["layers.0.k", "layers.1.k", "layers.3.k", "layers.5.k"], "layers.0-1,3,5.k"),
        (["layers.10.k", "layers.2.k", "layers.9.k"], "layers.2,9-10.k"),
        (["conv.0.norm1", "conv.0.norm2"], "conv.0.norm1-2"),
    ],
)
def test_joined_names_say_which_layers_they_are(names, joined):
    assert join_names(names) == joined


def test_layers_are_alike_by_their_names_and_facts():
    specs = {"a.0": 4, "b.0": 4, "a.1": 4, "a.2": 8}
    groups = alike(specs.items(), lambda layer: layer[0], lambda layer: layer[1])
    assert [[name for name, _ in group] for group in groups] == [["a.0", "a.1"], ["b.0"], ["a.2"]]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (40, ["encoder.layers.0-4.attention.k_proj"]),
        (29, ["encoder.layers.0-4.attention.", "  k_proj"]),
        (20, ["encoder.layers.0-4.", "  attention.k_proj"]),
        (9, ["encoder.", "  layers.", "  0-4.", "  attention.", "  k_proj"]),
    ],
)
def test_a_long_name_breaks_after_dots(width, lines):
    assert fold_name("encoder.layers.0-4.attention.k_proj", width).splitlines() == lines


def test_names_get_what_the_longest_spec_leaves():
    assert name_width(80, ["w4 g64", "w4 g64, int8 inputs"], others=20) == 41
    assert name_width(40, ["w4 g64, int8 inputs"], others=20) == 24
