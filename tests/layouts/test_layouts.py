"""Every layout equals one process, in float32 and with real gradient reductions.

One test body for all layouts, on gloo and, where there are enough GPUs, on NCCL. It compares the
logits of both heads, every loss term, and the gradient of every parameter on every rank that holds
a part of it. One layout alone::

    pytest "tests/layouts/test_layouts.py::test_layout_equals_one_process[gloo-tp2_ep2]"
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch

from mellum2_megatron.architecture import LatentAttention
from tests.distributed import gpu_count, run_distributed
from tests.layouts.worker import ARCHITECTURE, BATCH, SEQUENCE, Case, Outcome, shard

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
"""Largest difference, relative to a tensor's largest entry."""

DOCUMENTS = (5, 13, 3)
BALANCED = ("aux_loss", 0.5)
# At cp 2 rank 0 has one token that counts in the loss, rank 1 has fifteen.
UNEVEN = (*range(10), 25, *range(27, 32))

VARIANT = (
    ("mlp_layer_types", ("dense", "sparse", "sparse", "dense")),
    ("shared_expert_intermediate_size", 48),
)

# Values are narrower than queries and keys.
LATENT = (
    (
        "latent_attention",
        LatentAttention(
            kv_lora_rank=10, q_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=14
        ),
    ),
)

LAYOUTS: dict[str, tuple[int, Case]] = {
    "dp2": (2, Case()),
    "tp2": (2, Case(tp=2)),
    "ep2": (2, Case(ep=2)),
    "ep4": (4, Case(ep=4)),
    "ep2_allgather": (2, Case(ep=2, dispatcher="allgather")),
    "etp2": (2, Case(etp=2)),
    "pp2": (2, Case(pp=2)),
    "pp4": (4, Case(pp=4)),
    "pp2_vpp2": (2, Case(pp=2, vpp=2)),
    "cp2": (2, Case(cp=2)),
    "cp4": (4, Case(cp=4)),
    "tp2_ep2": (4, Case(tp=2, ep=2)),
    "cp2_ep2": (4, Case(cp=2, ep=2)),
    "pp2_ep2_dp2": (8, Case(pp=2, ep=2)),
    "tp2_pp2_cp2": (8, Case(tp=2, pp=2, cp=2)),
    "documents_tp2": (2, Case(tp=2, documents=DOCUMENTS, per_token=True)),
    "documents_cp2": (2, Case(cp=2, documents=DOCUMENTS, per_token=True)),
    # The second rank has no real token of any document.
    "short_documents_cp2": (2, Case(cp=2, documents=(2, 1, 2, 2), per_token=True)),
    "short_documents_cp2_ep2": (2, Case(cp=2, ep=2, documents=(2, 1, 2, 2), per_token=True)),
    "documents_cp4": (4, Case(cp=4, documents=DOCUMENTS, per_token=True)),
    "documents_masked_tp2_cp2": (
        4,
        Case(
            tp=2, cp=2, documents=DOCUMENTS, per_token=True, balance=BALANCED, mask=(*range(6, 16),)
        ),
    ),
    "documents_aux_loss_tp2_cp2": (
        4,
        Case(tp=2, cp=2, documents=DOCUMENTS, per_token=True, balance=BALANCED),
    ),
    # Where ranks count different numbers of tokens, only a mean over all tokens is independent of
    # the layout.
    "uneven_mask_cp2": (2, Case(cp=2, mask=UNEVEN, per_token=True)),
    "uneven_mask_tp2_dp2": (4, Case(tp=2, mask=UNEVEN, per_token=True)),
    # Chunks of 5 tokens divide no micro-batch evenly.
    "chunks": (1, Case(head_chunk=5)),
    "chunks_tp2": (2, Case(tp=2, head_chunk=5, mask=UNEVEN, per_token=True)),
    "chunks_cp2": (2, Case(cp=2, head_chunk=5, mask=UNEVEN, per_token=True)),
    # So are the load-balancing losses of one micro-batch or one sequence.
    "aux_loss_dp2": (2, Case(balance=("aux_loss", 0.5))),
    # So is the global one with its exact gradient.
    "exact_dp2": (2, Case(exact=True)),
    "exact_cp2_dp2": (4, Case(cp=2, exact=True)),
    "exact_per_token_tp2_dp2": (4, Case(tp=2, per_token=True, exact=True)),
    "seq_aux_loss_cp2_dp2": (4, Case(cp=2, balance=("seq_aux_loss", 0.5))),
    # Dense layers and a shared expert, of which tensor parallelism divides each MLP.
    "variant_tp2_ep2": (4, Case(tp=2, ep=2, changes=VARIANT)),
    "variant_pp2": (2, Case(pp=2, changes=VARIANT)),
    "latent_tp2_cp2": (4, Case(tp=2, cp=2, changes=LATENT)),
    "latent_pp2_ep2": (4, Case(pp=2, ep=2, changes=LATENT)),
    "latent_documents_tp2_cp2": (
        4,
        Case(tp=2, cp=2, documents=DOCUMENTS, per_token=True, balance=BALANCED, changes=LATENT),
    ),
}


def reference_of(ranks: int, case: Case) -> Case:
    """Return the step of one process that equals `case` on `ranks` ranks.

    With Megatron's global load-balancing loss that step has other micro-batches. The loss counts
    tokens over all ranks, so one process needs the sequences of `dp` ranks in one micro-batch. Its
    gradient is `dp` times too small unless `exact`: every rank divides its part by the tokens of
    all ranks, and DDP then averages (Megatron-LM issue 3672).
    """
    one = Case(
        balance=case.balance,
        per_token=case.per_token,
        documents=case.documents,
        mask=case.mask,
        changes=case.changes,
    )
    if case.balance[0] != "global_aux_loss":
        return one
    data = ranks // (case.tp * case.pp * case.cp)
    acts_like = case.balance[1] if case.exact else case.balance[1] / data
    return dataclasses.replace(one, micro_batch=data, balance=("global_aux_loss", acts_like))


@functools.cache
def reference(case: Case, backend: str) -> Outcome:
    return run_distributed("tests.layouts.worker:step", 1, case, backend=backend)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_layout_equals_one_process(layout: str, backend: str):
    ranks, case = LAYOUTS[layout]
    if backend == "nccl" and gpu_count() < ranks:
        pytest.skip(f"{ranks} GPUs needed, {gpu_count()} here")
    outcomes = run_distributed("tests.layouts.worker:step", ranks, case, backend=backend)
    compare(outcomes, case, reference(reference_of(ranks, case), backend))


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (2, Case(ep=2, sequences=8)),
        (2, Case(ep=2, sequences=8, head_chunk=5)),
        (2, Case(ep=2, sequences=8, documents=DOCUMENTS, per_token=True)),
        (4, Case(ep=2, pp=2, vpp=2, sequences=8)),
        (2, Case(ep=2, cp=2, sequences=4, documents=DOCUMENTS, per_token=True)),
    ],
    ids=["ep2", "ep2_chunks", "ep2_documents", "pp2_vpp2_ep2", "ep2_cp2_documents"],
)
def test_overlapped_exchanges_change_no_bit(ranks: int, case: Case):
    """Four micro-batches: the combined schedule against the plain one, on the same ranks.

    The exception is the embedding where the trunk and MTP share it.
    """
    plain, overlapped = (
        run_distributed("tests.layouts.worker:step", ranks, one)
        for one in (case, dataclasses.replace(case, overlap=True))
    )
    for one, other in zip(plain, overlapped, strict=True):
        assert other.losses.keys() >= {"aux", "z"}
        for name, loss in one.losses.items():
            assert torch.equal(other.losses[name], loss), f"{name} loss at {one.ranks}"
        assert other.gradients.keys() == one.gradients.keys()
        for name, gradient in one.gradients.items():
            if name.startswith("embedding.") and case.pp == 1:
                # The trunk's and MTP's parts join the sum over micro-batches one by one.
                close(other.gradients[name], gradient, gradient, name)
                continue
            assert torch.equal(other.gradients[name], gradient), f"gradient of {name}, {one.ranks}"


def compare(outcomes: list[Outcome], case: Case, expected: Outcome) -> None:
    """Compare every rank's part with its share of the reference; together they must cover it."""
    seen = {"gradients": set(), "logits": set(), "losses": set()}
    for outcome in outcomes:
        seen["gradients"] |= outcome.gradients.keys()
        seen["logits"] |= outcome.logits.keys()
        seen["losses"] |= outcome.losses.keys()
        for name, gradient in outcome.gradients.items():
            full = expected.gradients[name]
            share = shard(name, full, case, outcome.ranks)
            close(gradient, share, full, f"gradient of {name} at {outcome.ranks}")
        for key, logits in outcome.logits.items():
            full = expected.logits[key]  # [s, v]
            positions = held_positions(case, outcome.ranks["cp"])
            share = full[positions].chunk(case.tp, dim=-1)[outcome.ranks["tp"]]
            close(logits, share, full, f"logits {key} at {outcome.ranks}")
        for name, loss in outcome.losses.items():
            full = expected.losses[name]
            close(loss, full, full, f"{name} loss at {outcome.ranks}")
    assert seen["gradients"] == expected.gradients.keys()
    if case.head_chunk is None:  # else there are no logits of a whole micro-batch
        assert seen["logits"] == {(row, head) for row in range(BATCH) for head in ("main", "mtp")}
    assert seen["losses"] == {"lm", "mtp", "aux", "z"}


def close(actual: torch.Tensor, share: torch.Tensor, full: torch.Tensor, label: str) -> None:
    """Compare a part with its share of the reference, relative to the full tensor's largest entry.

    A rank's share may be all zeros (an expert that got no token), the full tensor may not.
    """
    assert actual.shape == share.shape, label
    scale = full.abs().max()
    assert scale > 0, f"{label}: nothing to compare"
    error = ((actual - share).abs().max() / scale).item()
    assert error < TOLERANCE, f"{label}: off by {error:.1e} of its largest entry"


def held_positions(case: Case, rank: int) -> list[int]:
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
    """Losses and gradients equal those of the documents in a shorter stream without padding."""
    case = Case(documents=DOCUMENTS, balance=(balance, 0.5), per_token=per_token)
    padded = reference(case, "gloo")
    tight = reference(dataclasses.replace(case, tight=True), "gloo")
    assert padded.losses.keys() == {"lm", "mtp", "aux", "z"}
    for name, loss in padded.losses.items():
        close(loss, tight.losses[name], tight.losses[name], f"{name} loss")
    for name, gradient in padded.gradients.items():
        close(gradient, tight.gradients[name], tight.gradients[name], f"gradient of {name}")


def test_labels_that_do_not_count_change_nothing():
    """The mask reaches both heads: their losses and all gradients are those of other labels."""
    masked = Case(mask=UNEVEN, per_token=True)
    plain, other = (
        reference(dataclasses.replace(masked, other_labels=changed), "gloo")
        for changed in (False, True)
    )
    for name, loss in plain.losses.items():
        close(other.losses[name], loss, loss, f"{name} loss")
    for name, gradient in plain.gradients.items():
        close(other.gradients[name], gradient, gradient, f"gradient of {name}")
    everything = reference(Case(per_token=True), "gloo").losses
    assert abs(everything["mtp"] - plain.losses["mtp"]) > 0.01, "the mask would change nothing"


@pytest.mark.parametrize("tight", [False, True], ids=["padding", "no-padding"])
def test_a_mask_does_not_change_the_weight_of_router_losses(tight: bool):
    """Where all micro-batches count equally many tokens, both kinds of mean have one gradient."""
    mask = tuple(range(6, 16))  # a question of ten tokens in the second document
    case = Case(documents=DOCUMENTS, balance=BALANCED, mask=mask, tight=tight)
    mean = reference(case, "gloo")
    per_token = reference(dataclasses.replace(case, per_token=True), "gloo")
    for name, gradient in per_token.gradients.items():
        close(gradient, mean.gradients[name], mean.gradients[name], f"gradient of {name}")
    for name, loss in per_token.losses.items():
        close(loss, mean.losses[name], mean.losses[name], f"{name} loss")


def test_the_reference_has_every_parameter_and_both_losses():
    """The comparison covers all parameters that the architecture counts."""
    outcome = reference(reference_of(1, Case()), "gloo")
    parameters = sum(gradient.numel() for gradient in outcome.gradients.values())
    assert parameters == ARCHITECTURE.num_parameters(mtp=True)
    layers = ARCHITECTURE.num_hidden_layers + 1  # and the MTP layer's
    assert outcome.losses["aux"].shape == outcome.losses["z"].shape == (layers,)
    assert outcome.losses["lm"] != outcome.losses["mtp"]
