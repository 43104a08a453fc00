"""Every parallel layout trains the same model: one process is the reference, float32, real gradient
reductions.

One test body for all layouts, on gloo and, where there are enough GPUs, on NCCL. Compared are the
logits of both heads, every loss term, and the gradient of every parameter on every rank that holds
a part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch

from tests.distributed import run_distributed
from tests.layouts.worker import ARCHITECTURE, BATCH, SEQUENCE, Case, Outcome, shard

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
"""Of a tensor's largest entry."""

DOCUMENTS = (5, 13, 3)
BALANCED = ("aux_loss", 0.5)
UNEVEN = (
    *range(10),
    25,
    *range(27, 32),
)  # at cp 2 rank 0 has one counting token, rank 1 has fifteen

LAYOUTS: dict[str, tuple[int, Case]] = {
    "dp 2": (2, Case()),
    "tp 2": (2, Case(tp=2)),
    "ep 2": (2, Case(ep=2)),
    "ep 4": (4, Case(ep=4)),
    "ep 2, allgather": (2, Case(ep=2, dispatcher="allgather")),
    "etp 2": (2, Case(etp=2)),
    "pp 2": (2, Case(pp=2)),
    "pp 4": (4, Case(pp=4)),
    "pp 2 vpp 2": (2, Case(pp=2, vpp=2)),
    "cp 2": (2, Case(cp=2)),
    "cp 4": (4, Case(cp=4)),
    "tp 2 ep 2": (4, Case(tp=2, ep=2)),
    "cp 2 ep 2": (4, Case(cp=2, ep=2)),
    "pp 2 ep 2 dp 2": (8, Case(pp=2, ep=2)),
    "tp 2 pp 2 cp 2": (8, Case(tp=2, pp=2, cp=2)),
    "documents, tp 2": (2, Case(tp=2, documents=DOCUMENTS, per_token=True)),
    "documents, cp 2": (2, Case(cp=2, documents=DOCUMENTS, per_token=True)),
    "documents, cp 4": (4, Case(cp=4, documents=DOCUMENTS, per_token=True)),
    "documents, aux_loss, tp 2 cp 2": (
        4,
        Case(tp=2, cp=2, documents=DOCUMENTS, per_token=True, balance=BALANCED),
    ),
    # Where ranks count different numbers of tokens, only one mean over all tokens knows no layout.
    "uneven mask, cp 2": (2, Case(cp=2, mask=UNEVEN, per_token=True)),
    "uneven mask, tp 2 dp 2": (4, Case(tp=2, mask=UNEVEN, per_token=True)),
    # The load-balancing losses that do not look beyond a micro-batch know no layout either.
    "aux_loss, dp 2": (2, Case(balance=("aux_loss", 0.5))),
    # Nor does the gradient of the global one that is its own.
    "exact, dp 2": (2, Case(exact=True)),
    "exact, cp 2 dp 2": (4, Case(cp=2, exact=True)),
    "exact, per token, tp 2 dp 2": (4, Case(tp=2, per_token=True, exact=True)),
    "seq_aux_loss, cp 2 dp 2": (4, Case(cp=2, balance=("seq_aux_loss", 0.5))),
}


def data_ranks(ranks: int, case: Case) -> int:
    return ranks // (case.tp * case.pp * case.cp)


def reference_of(ranks: int, case: Case) -> Case:
    """Return the step of one process that does the same as `case` on `ranks` ranks.

    For Megatron's global load-balancing loss that is not the same step on the same micro-batches.
    It counts tokens over all ranks, so one process must put what `dp` ranks see at a time into one
    micro-batch; and its gradient is `dp` times too small, since every rank divides its part by the
    tokens of all and DDP then averages (Megatron-LM issue 3672), unless it is asked to be exact.
    """
    one = Case(
        balance=case.balance, per_token=case.per_token, documents=case.documents, mask=case.mask
    )
    if case.balance[0] != "global_aux_loss":
        return one
    data = data_ranks(ranks, case)
    acts_like = case.balance[1] if case.exact else case.balance[1] / data
    return dataclasses.replace(one, micro_batch=data, balance=("global_aux_loss", acts_like))


@functools.cache
def reference(case: Case, backend: str) -> Outcome:
    return run_distributed("tests.layouts.worker:step", 1, case, backend=backend)[0]


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "gloo" and torch.cuda.is_available():
        pytest.skip("the CPU backend refuses beside a GPU: set CUDA_VISIBLE_DEVICES='' for these")
    return str(request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_one_process(layout: str, backend: str):
    ranks, case = LAYOUTS[layout]
    if backend == "nccl" and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs needed, {torch.cuda.device_count()} here")
    outcomes = run_distributed("tests.layouts.worker:step", ranks, case, backend=backend)
    compare(outcomes, case, reference(reference_of(ranks, case), backend))


def compare(outcomes: list[Outcome], case: Case, expected: Outcome) -> None:
    """Compare every rank's part with its share of the reference; together they must be all of
    it."""
    seen = {"gradients": set(), "logits": set(), "losses": set()}
    for outcome in outcomes:
        where = str(outcome.ranks)
        seen["gradients"] |= outcome.gradients.keys()
        seen["logits"] |= outcome.logits.keys()
        seen["losses"] |= outcome.losses.keys()
        for name, gradient in outcome.gradients.items():
            whole = expected.gradients[name]
            close(
                gradient,
                shard(name, whole, case, outcome.ranks),
                whole,
                f"gradient of {name} at {where}",
            )
        for key, logits in outcome.logits.items():
            whole = expected.logits[key]
            mine = whole[held(case, outcome.ranks["cp"])].chunk(case.tp, dim=-1)[
                outcome.ranks["tp"]
            ]
            close(logits, mine, whole, f"logits {key} at {where}")
        for name, loss in outcome.losses.items():
            close(loss, expected.losses[name], expected.losses[name], f"{name} loss at {where}")
    assert seen["gradients"] == expected.gradients.keys()
    assert seen["logits"] == {(row, head) for row in range(BATCH) for head in ("main", "mtp")}
    assert seen["losses"] == {"lm", "mtp", "aux", "z"}


def close(found: torch.Tensor, wanted: torch.Tensor, whole: torch.Tensor, what: str) -> None:
    assert found.shape == wanted.shape, what
    scale = whole.abs().max()
    assert scale > 0, f"{what}: nothing to compare"
    error = ((found - wanted).abs().max() / scale).item()
    assert error < TOLERANCE, f"{what}: off by {error:.1e} of its largest entry"


def held(case: Case, rank: int) -> list[int]:
    """Return the positions of a sequence that a context-parallel rank holds, by definition."""
    rooms = [-(-length // 8) * 8 for length in case.documents] or [SEQUENCE]
    positions = []
    for start, room in zip(itertools.accumulate(rooms, initial=0), rooms, strict=False):
        chunks = [
            list(range(start + i, start + i + room // (2 * case.cp)))
            for i in range(0, room, room // (2 * case.cp))
        ]
        positions += chunks[rank] + chunks[2 * case.cp - 1 - rank]
    return positions if case.cp > 1 else sorted(positions)


@pytest.mark.parametrize("balance", ["global_aux_loss", "aux_loss", "seq_aux_loss"])
@pytest.mark.parametrize("per_token", [False, True])
def test_padding_between_documents_changes_nothing(balance: str, per_token: bool):
    """All losses, counts included, and gradients are those of the same documents in a shorter
    stream without it."""
    padded = Case(documents=DOCUMENTS, balance=(balance, 0.5), per_token=per_token)
    found, wanted = (
        reference(padded, "gloo"),
        reference(dataclasses.replace(padded, tight=True), "gloo"),
    )
    assert found.losses.keys() == {"lm", "mtp", "aux", "z"}
    for name, loss in found.losses.items():
        close(loss, wanted.losses[name], wanted.losses[name], f"{name} loss")
    for name, gradient in found.gradients.items():
        close(gradient, wanted.gradients[name], wanted.gradients[name], f"gradient of {name}")


def test_the_reference_has_every_parameter_and_both_losses():
    """The comparison covers the whole model, as the architecture counts it."""
    outcome = reference(reference_of(1, Case()), "gloo")
    assert sum(
        gradient.numel() for gradient in outcome.gradients.values()
    ) == ARCHITECTURE.num_parameters(mtp=True)
    assert (
        outcome.losses["aux"].shape
        == outcome.losses["z"].shape
        == (ARCHITECTURE.num_hidden_layers + 1,)
    )
    assert outcome.losses["lm"] != outcome.losses["mtp"]
