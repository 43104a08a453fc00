"""Error rates of simulated studies, and the table of them in the documentation."""

from __future__ import annotations

import pytest

from ablations.answering.simulations import STUDIES, Rate, powers, rates
from tests import REPOSITORY

PAGE = REPOSITORY / "docs" / "ablation_statistics.md"


@pytest.fixture(scope="module")
def simulated() -> list[Rate]:
    return list(rates(2000))


def test_stated_rates_hold(simulated: list[Rate]) -> None:
    for rate in simulated:
        if rate.stated is not None:
            # Intervals over documents are simulated a tenth as often.
            allowed = 0.02 + (0.02 if rate.studies < 500 else 0)
            assert abs(rate.rate - rate.stated) <= allowed, rate


def test_methods_not_used_are_wrong(simulated: list[Rate]) -> None:
    unused = {rate.name: rate.rate for rate in simulated if "not used" in rate.name}
    bootstrap = unused.pop("95% bootstrap over 3 seeds (not used)")
    assert bootstrap < 0.75
    assert len(unused) == 2
    assert min(unused.values()) > 0.09


def test_page_has_the_table(simulated: list[Rate]) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    quoted = {row[0]: row for row in rows if len(row) == 4}
    for rate in simulated:
        _, studies, share, stated = quoted[rate.name]
        large = STUDIES if rate.studies == 2000 else STUDIES // 10
        assert int(studies.replace(",", "")) == large
        assert float(share.strip("%")) / 100 == pytest.approx(rate.rate, abs=0.04)
        assert stated == ("" if rate.stated is None else f"{rate.stated:.1%}")
    found = {(row[0], row[1]): row[2] for row in rows if len(row) == 3}
    for effect, look, power in powers(2000):
        printed = float(found[f"{effect:g}", str(look)].strip("%")) / 100
        assert printed == pytest.approx(power, abs=0.03)
