import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysv.corpus.groups import Groups, connected


@given(st.lists(st.lists(st.integers(0, 9))))
def test_groups_come_back_as_they_went_in(listed):
    groups = Groups.of(listed)
    assert [group.tolist() for group in groups] == listed
    assert len(groups) == len(listed)
    assert groups.sizes.tolist() == [len(group) for group in listed]
    assert groups.members.dtype == groups.starts.dtype == np.int64


@given(st.lists(st.integers(0, 5)))
def test_the_places_of_each_label_are_in_order(labels):
    groups = Groups.by_label(np.array(labels, np.int64), 7)
    assert [group.tolist() for group in groups] == [
        [place for place, other in enumerate(labels) if other == label] for label in range(7)
    ]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_group_that_is_not_there_is_an_error(index):
    with pytest.raises(IndexError, match=f"2 groups, numbered from 0; there is no {index}"):
        Groups.of([[1], [2, 3]])[index]


@st.composite
def linked_things(draw):
    count = draw(st.integers(1, 12))
    thing = st.integers(0, count - 1)
    return count, draw(st.lists(st.tuples(thing, thing)))


@given(linked_things())
def test_connected_things_share_a_number_and_others_do_not(linked):
    count, links = linked
    reached = np.eye(count, dtype=bool)
    for one, other in links:
        reached[one, other] = reached[other, one] = True
    for middle in range(count):  # Warshall's transitive closure
        reached |= reached[:, [middle]] & reached[[middle]]
    numbers = connected(count, *np.array(links, np.int64).reshape(-1, 2).T)
    np.testing.assert_array_equal(numbers[:, None] == numbers, reached)
    assert set(numbers) == set(range(numbers.max() + 1))


@pytest.mark.parametrize("order", [1, -1])
def test_a_long_chain_is_one(order):
    count = 100_000
    links = np.random.default_rng(0).permutation(np.stack([np.arange(count - 1), np.arange(1, count)], axis=1))
    assert not connected(count, *links[:, ::order].T).any()
