"""Near-duplicates against exact Jaccard, datasketch and brute-force components."""

import hashlib
import itertools
import random

import numpy as np
import pytest
from datasketch import MinHash
from numpy.typing import NDArray

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus import near_duplicates
from mellum2_megatron.data.corpus.near_duplicates import (
    Components,
    NearDuplicateSettings,
    all_candidate_pairs,
    band_keys,
    candidate_pairs,
    jaccard,
    ngrams,
    numpy_signatures,
    shingles,
    signatures,
    verified,
)

SETTINGS = NearDuplicateSettings()
Ids = NDArray[np.int32]


def random_ids(generator: np.random.Generator, length: int) -> Ids:
    return generator.integers(0, 4096, length, dtype=np.int32)


def edited(ids: Ids, places: int, generator: np.random.Generator) -> Ids:
    """Change tokens at random places; each changes five shingles."""
    copy = ids.copy()
    chosen = generator.choice(len(ids), places, replace=False)
    copy[chosen] = generator.integers(5000, 9000, places)
    return copy


def planted(pairs: int, places: int, seed: int) -> list[Ids]:
    """Return documents of which 2i and 2i + 1 are alike."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(pairs):
        original = random_ids(generator, 400)
        documents += [original, edited(original, places, generator)]
    return documents


def pairs_of(documents: list[Ids], settings: NearDuplicateSettings = SETTINGS) -> NDArray[np.int64]:
    keys = band_keys(signatures(documents, settings), settings)
    return candidate_pairs(keys.ravel(), np.repeat(np.arange(len(documents)), settings.bands))


def similarity(one: Ids, other: Ids) -> float:
    """Exact Jaccard similarity of 5-grams, by Python's sets."""
    grams = [
        {tuple(ids[place : place + 5].tolist()) for place in range(len(ids) - 4)}
        for ids in (one, other)
    ]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_exact_similarity_equals_pythons_sets() -> None:
    for one, other in itertools.batched(planted(10, 12, seed=3), 2):
        assert jaccard(shingles(one, 5), shingles(other, 5)) == similarity(one, other)
    empty = shingles(np.zeros(0, dtype=np.int32), 5)
    assert jaccard(empty, empty) == 1.0
    # A document shorter than a shingle is one n-gram of its own length.
    short = np.array([7, 8], dtype=np.int32)
    assert len(ngrams(short, 5)) == 1
    assert ngrams(short, 5) != ngrams(short[::-1], 5)


def test_recall_at_080_and_no_merge_below_050() -> None:
    alike = planted(200, 8, seed=1)
    similarities = [similarity(one, other) for one, other in itertools.batched(alike, 2)]
    assert 0.78 < np.mean(similarities) < 0.86
    found = {tuple(pair) for pair in pairs_of(alike).tolist()}
    planted_pairs = {(n, n + 1) for n in range(0, len(alike), 2)}
    assert len(found & planted_pairs) >= 0.9 * len(planted_pairs)
    assert found <= planted_pairs

    apart = planted(200, 40, seed=2)
    assert max(similarity(one, other) for one, other in itertools.batched(apart, 2)) < 0.5
    settings = NearDuplicateSettings(verify=True)
    candidates = pairs_of(apart, settings)
    assert not len(verified(candidates, lambda n: shingles(apart[n], 5), settings))
    assert len(candidates) < 4


@pytest.mark.parametrize("implementation", ["rensa", "numpy"])
def test_signatures_estimate_as_well_as_datasketch(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root mean square error of the estimated similarity; theory gives 0.037 at 112 minima."""
    monkeypatch.setattr(near_duplicates, "has_rensa", lambda: implementation == "rensa")
    documents = planted(60, 12, seed=4)
    ours = signatures(documents, SETTINGS)

    def theirs(ids: Ids) -> MinHash:
        sketch = MinHash(num_perm=SETTINGS.permutations)
        sketch.update_batch([word.tobytes() for word in ngrams(ids, 5)])
        return sketch

    errors = []
    for n in range(0, len(documents), 2):
        exact = similarity(documents[n], documents[n + 1])
        reference = theirs(documents[n]).jaccard(theirs(documents[n + 1]))
        errors.append((float((ours[n] == ours[n + 1]).mean()) - exact, reference - exact))
    own_error, reference_error = np.sqrt(np.mean(np.square(errors), axis=0))
    assert own_error < 0.055
    assert reference_error < 0.055
    assert abs(np.mean(errors, axis=0)[0]) < 0.02


def test_repeats_and_order_inside_a_batch_do_not_matter() -> None:
    documents = planted(4, 5, seed=5)
    together = signatures(documents, SETTINGS)
    for n, ids in enumerate(documents):
        assert (signatures([ids], SETTINGS)[0] == together[n]).all()
    doubled = np.concatenate((documents[0], documents[0][:300]))
    assert (signatures([doubled], SETTINGS)[0] == together[0]).mean() > 0.9
    assert signatures([], SETTINGS).shape == (0, 112)
    empty = np.zeros(0, dtype=np.int32)
    for made in (
        signatures([empty, documents[0], empty], SETTINGS),
        numpy_signatures(np.zeros(0, dtype=np.uint64), np.zeros(4, dtype=np.int64), SETTINGS),
    ):
        assert (made[[0, 2]] == 0xFFFFFFFF).all()


def by_hand(pairs: list[tuple[int, int]], hashes: list[bytes]) -> list[bool]:
    """Components by repeated joining of sets."""
    groups = [{n} for n in range(len(hashes))]
    for one, other in pairs:
        first = next(group for group in groups if one in group)
        second = next(group for group in groups if other in group)
        if first is not second:
            groups.remove(second)
            first |= second
    best = {min(group, key=lambda n: (hashes[n], n)) for group in groups}
    return [n in best for n in range(len(hashes))]


def ranks_of(hashes: list[bytes]) -> NDArray[np.int64]:
    in_turn = sorted(range(len(hashes)), key=lambda n: (hashes[n], n))
    return np.argsort(np.array(in_turn, dtype=np.int64))


def survivors(
    pairs: NDArray[np.int64], ranks: NDArray[np.int64], *, parts: int = 1
) -> NDArray[np.bool_]:
    components = Components(len(ranks))
    for some in np.array_split(ranks[pairs], parts):
        components.join(some)
    return components.survive(ranks)


@pytest.mark.parametrize("seed", range(20))
def test_survivors_equal_brute_force_in_any_order(seed: int) -> None:
    generator = random.Random(seed)
    count = generator.randrange(1, 40)
    hashes = [hashlib.sha256(str(generator.randrange(30)).encode()).digest() for _ in range(count)]
    ranks = ranks_of(hashes)
    pairs = [
        (generator.randrange(count), generator.randrange(count))
        for _ in range(generator.randrange(0, count))
    ]
    expected = by_hand(pairs, hashes)
    assert survivors(np.array(pairs, dtype=np.int64).reshape(-1, 2), ranks).tolist() == expected
    generator.shuffle(pairs)
    again = np.array([(other, one) for one, other in pairs], dtype=np.int64).reshape(-1, 2)
    assert survivors(again, ranks, parts=5).tolist() == expected


def test_partitions_of_the_keys_give_the_same_survivors() -> None:
    """Five tasks, each with the keys of one residue, find what one task finds."""
    documents = planted(30, 4, seed=6)
    documents += [documents[0].copy(), documents[0].copy(), documents[2].copy()]
    hashes = ranks_of([hashlib.sha256(ids.tobytes()).digest() for ids in documents])
    keys = band_keys(signatures(documents, SETTINGS), SETTINGS).ravel()
    owners = np.repeat(np.arange(len(documents)), SETTINGS.bands)
    whole = survivors(candidate_pairs(keys, owners), hashes)
    parts = [
        candidate_pairs(keys[keys % np.uint64(5) == part], owners[keys % np.uint64(5) == part])
        for part in np.arange(5, dtype=np.uint64)
    ]
    assert (survivors(np.concatenate(parts), hashes) == whole).all()
    assert whole.sum() == 30
    # The chain of a key joins the same documents as all its pairs.
    every = np.concatenate(list(all_candidate_pairs(keys, owners)))
    assert (survivors(every, hashes) == whole).all()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"near_duplicates\.rows=0"):
        NearDuplicateSettings(rows=0)
    with pytest.raises(InputError, match=r"near_duplicates\.threshold=70"):
        NearDuplicateSettings(threshold=70)
