"""The torch core attention against a plain formula: windows, documents, context parallelism."""

from __future__ import annotations

import itertools

import pytest
import torch

from mellum2_megatron.model.context_parallel import (
    chunk_order,
    document_boundaries,
    partition_indices,
)
from tests.distributed import run_distributed
from tests.layouts.attention_worker import SCALE, Problem, held, inputs
from tests.model.packing import packed_documents

TOLERANCE = 1e-12

PROBLEMS = [
    Problem(window=window, rooms=rooms, lengths=lengths, block=block)
    for window, (rooms, lengths), block in itertools.product(
        (None, 1, 3, 8, 9, 64),  # a chunk of a sequence of 32 has 8 places at cp 2, 4 at cp 4
        (
            ((32,), None),
            ((8, 32, 8, 16), (8, 32, 8, 16)),
            ((8, 32, 8, 16), (1, 27, 8, 3)),  # padding, in chunks that are partly and wholly empty
        ),
        (2048, 3),
    )
]


def plain(problem: Problem) -> tuple[torch.Tensor, ...]:
    """Return softmax attention written out: output and gradients of query, key and value.

    All are those of the whole stream: `[t, b, n * d]`, `[t, b, n, d]`, and twice `[t, b, g, d]`.
    """
    query, key, value, weight = inputs(problem)
    leaves = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    places = torch.arange(len(query))
    document = torch.repeat_interleave(
        torch.arange(len(problem.rooms)), torch.tensor(problem.rooms)
    )
    starts = torch.tensor([0, *itertools.accumulate(problem.rooms)])[document]
    real = places - starts < torch.tensor(problem.lengths or problem.rooms)[document]
    distance = places[:, None] - places[None, :]
    visible = (
        (distance >= 0) & (document[:, None] == document[None, :]) & real[:, None] & real[None, :]
    )
    if problem.window is not None:
        visible &= distance < problem.window
    group = torch.arange(query.size(2)) // (query.size(2) // key.size(2))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key[:, :, group]) * SCALE
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1).nan_to_num(0.0)
    output = torch.einsum("bnqk,kbnd->qbnd", weights, value[:, :, group])
    return output.detach().flatten(2), *torch.autograd.grad((output * weight).sum(), leaves)


@pytest.mark.distributed
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_attention_equals_the_plain_formula(cp: int):
    outcomes = run_distributed("tests.layouts.attention_worker:attend", cp, PROBLEMS)
    for number, problem in enumerate(PROBLEMS):
        expected = plain(problem)
        for rank in range(cp):
            places = held(problem, cp, rank)
            for name, actual, full in zip(
                ("output", "dq", "dk", "dv"), outcomes[rank][number], expected, strict=True
            ):
                share = full[places] if problem.lengths is None else full[places].squeeze(1)
                assert actual.shape == share.shape
                error = (actual - share).abs().max().item()
                assert error < TOLERANCE, (
                    f"{name} of {problem} on rank {rank} of {cp}: off by {error:.1e}"
                )


def test_padding_attends_to_nothing():
    """The formula above gives padding an output of 0 and no gradient, and nothing depends on it."""
    problem = Problem(window=None, rooms=(8,), lengths=(5,))
    output, *gradients = plain(problem)
    assert torch.count_nonzero(output[5:]) == 0
    assert all(torch.count_nonzero(gradient[5:]) == 0 for gradient in gradients)
    assert all(
        torch.count_nonzero(tensor[:5]) == tensor[:5].numel() for tensor in (output, gradients[2])
    )


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_partition_equals_its_definition(cp: int):
    rooms = [2 * cp, 6 * cp, 4 * cp]
    boundaries = [0, *itertools.accumulate(rooms)]
    parts = [partition_indices(boundaries, cp, rank) for rank in range(cp)]
    problem = Problem(window=None, rooms=tuple(rooms), lengths=None)
    assert [part.tolist() for part in parts] == [held(problem, cp, rank) for rank in range(cp)]
    assert torch.cat(parts)[chunk_order(boundaries, cp)].tolist() == list(range(boundaries[-1]))


def test_a_document_that_does_not_divide_is_named():
    with pytest.raises(
        ValueError, match=r"a document of 6 tokens at 8: .* pad it to a multiple of 4"
    ):
        partition_indices([0, 8, 14], 2, 0)


def test_contradictory_documents_are_refused():
    good = packed_documents((5, 8), (8, 8))
    assert document_boundaries(good, 16, 2) == ([0, 8, 16], [5, 8])
    # Without context parallelism, tokens of no document may follow.
    assert document_boundaries(good, 20, 1) == ([0, 8, 16], [5, 8])
    with pytest.raises(ValueError, match="a stream of 20 tokens over 2"):
        document_boundaries(good, 20, 2)
    with pytest.raises(ValueError, match="a stream of 12 tokens over 1"):
        document_boundaries(good, 12, 1)
    with pytest.raises(ValueError, match="do not fit into"):
        document_boundaries(packed_documents((9, 8), (8, 8)), 16, 1)
    good.cu_seqlens_kv = good.cu_seqlens_kv + 1
    with pytest.raises(ValueError, match="queries and keys"):
        document_boundaries(good, 16, 1)
