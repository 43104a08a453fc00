"""FIM: nothing lost, positions uniform, rates as set, independent of order and number of calls."""

import hashlib
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.tokens.fill_in_middle import (
    Cut,
    FimCounts,
    FimRole,
    FimSettings,
    Sentinels,
    binomial_bounds,
    choose,
    join,
    restore,
)
from mellum2_megatron.data.tokens.keyed_random import KeyedRandom

SENTINELS = Sentinels(prefix=3, middle=4, suffix=5)
RANDOM = KeyedRandom(1234, "fim", 1, 0)


def document(number: int) -> int:
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:16], "little")


def cuts(settings: FimSettings, count: int, *, is_code: bool = True) -> list[Cut]:
    return [choose(settings, RANDOM, document(n), is_code=is_code) for n in range(count)]


def encode(text: str) -> np.ndarray:
    """Every character is a token of its own, ten above the sentinels."""
    return np.array([ord(character) + 10 for character in text], dtype=np.int32)


@pytest.mark.parametrize("spm_order", ["mellum", "starcoder"])
@pytest.mark.parametrize("text", ["", "a", "ab", "def f(x):\n    return '€' + x\n", "\x00\u0301🙂"])
def test_restored_ids_are_the_text(text: str, spm_order: Literal["mellum", "starcoder"]) -> None:
    settings = FimSettings(rate=1.0, spm_order=spm_order)
    for cut in cuts(settings, 40):
        prefix, middle, suffix = cut.split(text)
        assert prefix + middle + suffix == text
        ids = join((encode(prefix), encode(middle), encode(suffix)), cut.role, SENTINELS, settings)
        role, restored = restore(ids, SENTINELS)
        assert restored.tolist() == encode(text).tolist()
        if prefix:
            assert role is cut.role


def test_orders_are_those_of_the_papers() -> None:
    parts = encode("P"), encode("M"), encode("S")
    p, m, s = (int(part[0]) for part in parts)

    def order(role: FimRole, spm: Literal["mellum", "starcoder"] = "mellum") -> list[int]:
        return join(parts, role, SENTINELS, FimSettings(spm_order=spm)).tolist()

    assert order(FimRole.PSM) == [3, p, 5, s, 4, m]
    assert order(FimRole.SPM) == [5, s, 3, p, 4, m]
    assert order(FimRole.SPM, "starcoder") == [3, 5, s, 4, p, m]


def test_rates_lie_in_their_bounds_and_code_only_holds() -> None:
    settings = FimSettings(rate=0.5)
    counts = FimCounts()
    for cut in cuts(settings, 4000):
        counts.add(cut.role)
    report = counts.report(settings)
    assert counts.eligible == 4000
    for name in ("rate", "psm_share"):
        low, high = report[f"{name}_bounds"]
        assert low < report[name] < high
        assert 0.45 < low < 0.5 < high < 0.55
    text_only = cuts(FimSettings(rate=1.0, code_only=True), 100, is_code=False)
    assert {cut.role for cut in text_only} == {FimRole.NONE}
    assert all(cut.role for cut in cuts(FimSettings(rate=1.0, code_only=True), 100))


def test_bounds_hold_what_binomial_draws_give() -> None:
    low, high = binomial_bounds(500, 0.1)
    inside = stats.binom.cdf(high * 500, 500, 0.1) - stats.binom.cdf(low * 500 - 1, 500, 0.1)
    assert 0.998 < inside < 1
    assert binomial_bounds(0, 0.5) == [0.0, 1.0]


def test_cuts_are_uniform() -> None:
    """Kolmogorov-Smirnov for both positions; sorted, they are Beta(1, 2) and Beta(2, 1)."""
    length = 10_000
    parts = [cut.split("x" * length) for cut in cuts(FimSettings(rate=1.0), 3000)]
    first = np.array([len(prefix) for prefix, _, _ in parts]) / length
    second = np.array([length - len(suffix) for _, _, suffix in parts]) / length
    assert stats.kstest(first, stats.beta(1, 2).cdf).pvalue > 0.001
    assert stats.kstest(second, stats.beta(2, 1).cdf).pvalue > 0.001
    # Both ends can be cut: with one character there are three splits with an empty middle or not.
    single = {tuple(cut.split("x")) for cut in cuts(FimSettings(rate=1.0), 200)}
    assert single == {("", "", "x"), ("", "x", ""), ("x", "", "")}


def test_decisions_depend_on_the_key_alone() -> None:
    settings = FimSettings(rate=0.5)
    forward = cuts(settings, 50)
    backward = [
        choose(settings, KeyedRandom(1234, "fim", 1, 0), document(n), is_code=True)
        for n in reversed(range(50))
    ]
    assert forward == backward[::-1]
    for other in (
        KeyedRandom(1235, "fim", 1, 0),
        KeyedRandom(1234, "fim", 2, 0),
        KeyedRandom(1234, "fim", 1, 1),
    ):
        changed = [choose(settings, other, document(n), is_code=True) for n in range(50)]
        assert changed != forward
    # The stream is part of the format of prepared data: these words may never change.
    assert RANDOM.words(document(0), 2) == KeyedRandom(1234, "fim", 1, 0).words(document(0), 4)[:2]
    assert RANDOM.words(5, 1) == [11294441950695665913]


def test_a_document_reordered_under_two_rates_has_the_same_cuts() -> None:
    few, many = cuts(FimSettings(rate=0.1), 500), cuts(FimSettings(rate=0.5), 500)
    reordered = [n for n, cut in enumerate(few) if cut.role]
    assert len(reordered) > 20
    assert all(few[n] == many[n] for n in reordered)


def test_damaged_orders_are_refused() -> None:
    for ids in ([3, 10], [3, 5, 5, 4], [4, 3, 5], [10, 3, 5, 4]):
        with pytest.raises(InputError, match="FIM sentinels"):
            restore(np.array(ids), SENTINELS)
    assert restore(np.array([10, 11]), SENTINELS)[0] is FimRole.NONE
    with pytest.raises(InputError, match="an id each"):
        Sentinels(prefix=3, middle=3, suffix=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rate", 1.5), ("rate", float("nan")), ("level", "word"), ("psm_share", -1)],
)
def test_bad_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"fim.{field}"):
        FimSettings(**{field: value})
