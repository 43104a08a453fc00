"""Best-fit packing against its definition, one piece at a time."""

from __future__ import annotations

import numpy as np
import pytest

from mellum2_megatron.data.tokens.best_fit_packing import best_fit, cut_documents, pack, shuffle


def naive_rooms(lengths: list[int], capacity: int) -> list[int]:
    """Return the rooms left by best-fit decreasing, sorted: the fullest pack that fits, or new."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def drawn(case: int) -> tuple[list[int], int]:
    random = np.random.default_rng(case)
    capacity = int(random.integers(1, 120))
    count = int(random.integers(0, 150))
    shape = random.choice([0.3, 1.0, 4.0])  # few long ones, even, many long ones
    lengths = 1 + (random.random(count) ** shape * capacity).astype(int) % capacity
    return lengths.tolist(), capacity


@pytest.mark.parametrize("case", range(150))
def test_packs_are_those_of_the_definition(case: int) -> None:
    lengths, capacity = drawn(case)
    packs = best_fit(lengths, capacity=capacity)
    filled = np.bincount(packs, weights=lengths) if lengths else np.empty(0)
    assert sorted((capacity - filled).astype(int).tolist()) == naive_rooms(lengths, capacity)


def test_large_capacities_sort_by_another_key() -> None:
    lengths = np.random.default_rng(0).integers(1, 131_073, 400).tolist()
    packs = best_fit(lengths, capacity=131_072)
    filled = np.bincount(packs, weights=lengths)
    assert sorted((131_072 - filled).astype(int).tolist()) == naive_rooms(lengths, 131_072)


@pytest.mark.parametrize("lengths", [[0], [5], [3, -1]])
def test_pieces_that_fit_no_pack_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="packs of 4"):
        best_fit(lengths, capacity=4)


def test_only_longer_documents_are_cut_and_nothing_is_lost() -> None:
    pieces = cut_documents([3, 0, 8, 9, 25], capacity=8)
    assert pieces.documents.tolist() == [0, 2, 3, 3, 4, 4, 4, 4]
    assert pieces.starts.tolist() == [0, 0, 0, 8, 0, 8, 16, 24]
    assert pieces.lengths.tolist() == [3, 8, 8, 1, 8, 8, 8, 1]
    assert pieces.dropped.size == 0


def test_longer_documents_may_be_dropped() -> None:
    pieces = cut_documents([3, 0, 8, 9, 25], capacity=8, policy="drop")
    assert pieces.documents.tolist() == [0, 2]
    assert pieces.dropped.tolist() == [3, 4]


def test_a_pack_for_each_piece() -> None:
    assert pack([3, 1, 1], capacity=8, policy="pad").tolist() == [0, 1, 2]
    assert pack([3, 1, 1], capacity=8).tolist() == [0, 0, 0]


def test_packs_and_their_pieces_come_in_random_order() -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 60, 20_000)
    packs = best_fit(lengths, capacity=100)
    order = shuffle(packs, seed=7)
    assert sorted(order.pieces.tolist()) == list(range(20_000))
    groups = [
        order.pieces[start:end]
        for start, end in zip(order.starts[:-1], order.starts[1:], strict=True)
    ]
    before = {tuple(np.flatnonzero(packs == number)) for number in range(50)}
    after = {tuple(sorted(group.tolist())) for group in groups}
    assert before <= after
    # Neither the place of a pack nor that of a piece in it depends on lengths.
    filled = np.array([lengths[group].max() for group in groups])
    assert abs(np.corrcoef(np.arange(filled.size), filled)[0, 1]) < 0.03
    pairs = [lengths[group] for group in groups if group.size == 2]
    assert 0.45 < np.mean([first > second for first, second in pairs if first != second]) < 0.55
    assert shuffle(packs, seed=7).pieces.tolist() == order.pieces.tolist()
    assert shuffle(packs, seed=8).pieces.tolist() != order.pieces.tolist()


def test_pieces_by_rank_stay_in_their_packs() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 2_000)
    packs = best_fit(lengths, capacity=100)
    order, ranked = shuffle(packs, seed=7), shuffle(packs, seed=7, rank=-lengths)
    assert ranked.starts.tolist() == order.starts.tolist()
    for start, end in zip(order.starts[:-1], order.starts[1:], strict=True):
        pieces = ranked.pieces[start:end]
        assert sorted(pieces.tolist()) == sorted(order.pieces[start:end].tolist())
        assert lengths[pieces].tolist() == sorted(lengths[pieces].tolist(), reverse=True)
