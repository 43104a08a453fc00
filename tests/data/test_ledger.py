"""The ledger: phases take exact, disjoint parts; too many passes are refused with the gap."""

import numpy as np
import pytest

from mellum2_megatron.data.pipeline.ledger import BUCKETS, Part, Shortage, allot, take


def test_parts_join_without_gap_or_overlap() -> None:
    """Phase after phase walks through the buckets: seen counts differ by one pass at most."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 50, BUCKETS).astype(np.int64)
    needed = [{"code": 30_000}, {"code": 90_000}, {"code": 150_000}]
    allotments, shortages = allot({"code": tokens}, needed, {"code": 4})
    assert not shortages
    seen = np.zeros(BUCKETS, dtype=int)
    for allotment in allotments:
        taken = 0
        for part in allotment.parts:
            # A bucket is seen for the n-th time in epoch n - 1.
            assert (seen[part.first : part.last] == part.epoch).all()
            seen[part.first : part.last] += 1
            taken += int(tokens[part.first : part.last].sum())
        assert taken == allotment.taken >= allotment.needed
        assert taken - allotment.needed < tokens.max()
        assert seen.max() - seen.min() <= 1
    assert allotments[-1].passes == sum(one.taken for one in allotments) / tokens.sum()


def test_take_one_bucket_and_many_passes() -> None:
    tokens = np.array([5, 0, 5], dtype=np.int64)
    assert take(tokens, 5, (0, 0)) == ((Part(epoch=0, first=0, last=1),), 5, (0, 1))
    parts, taken, place = take(tokens, 21, (0, 1))
    assert [(part.epoch, part.first, part.last) for part in parts] == [
        (0, 1, 3),
        (1, 0, 3),
        (2, 0, 3),
    ]
    assert (taken, place) == (25, (3, 0))


def test_shortage_names_the_missing_tokens() -> None:
    tokens = np.full(BUCKETS, 10, dtype=np.int64)
    enough = 4 * int(tokens.sum())
    allotments, shortages = allot({"web": tokens}, [{"web": enough}], {"web": 4})
    assert allotments[0].passes == 4
    assert not shortages
    _, (shortage,) = allot({"web": tokens}, [{"web": enough + 1}], {"web": 4})
    assert shortage.missing == 1
    allotments, shortages = allot(
        {"web": tokens, "code": tokens},
        [{"web": enough}, {"web": 4, "code": 7}],
        {"web": 4, "code": 3},
    )
    assert shortages == [Shortage(source="web", available=40_960, needed=enough + 4, epochs=4)]
    assert shortages[0].missing == 4
    assert [one.source for one in allotments] == ["code"]
    message = str(shortages[0].error())
    assert "need 163,844, and 4 passes, the most allowed, give 163,840" in message
    assert "add text of 1 tokens or more" in message


def test_empty_source_is_a_shortage() -> None:
    nothing = np.zeros(BUCKETS, dtype=np.int64)
    _, shortages = allot({"web": nothing}, [{"web": 10}], {"web": 4})
    assert shortages[0].missing == 10
    assert "give 0" in str(shortages[0].error())
    # A source that no phase uses needs nothing.
    assert allot({"web": nothing}, [{}], {"web": 4}) == ([], [])


def test_margin_is_taken_in_addition() -> None:
    tokens = np.full(BUCKETS, 10, dtype=np.int64)
    plain, _ = allot({"a": tokens}, [{"a": 1000}], {"a": 1})
    more, _ = allot({"a": tokens}, [{"a": 1000}], {"a": 1}, margin=0.1)
    assert (plain[0].taken, more[0].taken) == (1000, 1100)


@pytest.mark.parametrize("needed", [1, 40_959, 40_960, 40_961, 81_920])
def test_take_ends_at_the_bucket_that_suffices(needed: int) -> None:
    tokens = np.full(BUCKETS, 10, dtype=np.int64)
    parts, taken, _ = take(tokens, needed, (0, 0))
    assert taken == -(-needed // 10) * 10
    assert sum(part.last - part.first for part in parts) == taken // 10
