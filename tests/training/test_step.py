"""A micro-batch: each rank's part of the sample, the model's arguments, and the sum of the loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training import global_vars

from mellum2_megatron.training.step import forward_step, sum_loss
from tests.distributed import run_distributed
from tests.training.step_worker import use_arguments

LENGTH = 16
SAMPLE = {
    # No two fields and no two places hold the same number.
    "tokens": torch.arange(2 * LENGTH).view(2, LENGTH) + 100,
    "labels": torch.arange(2 * LENGTH).view(2, LENGTH) + 200,
    "loss_mask": (torch.arange(2 * LENGTH).view(2, LENGTH) % 3 > 0).float(),
    "position_ids": torch.arange(2 * LENGTH).view(2, LENGTH) + 300,
}
EVERYTHING = tuple(SAMPLE)
# Of four chunks the first and the last, or the two between.
ZIGZAG = ([*range(4), *range(12, 16)], [*range(4, 12)])

# Layout, MTP layers, and the fields that each pipeline stage reads.
CASES: dict[str, tuple[dict[str, int], int | None, list[tuple[str, ...]]]] = {
    "one": ({}, 1, [EVERYTHING]),
    "cp2": ({"cp": 2}, 1, [EVERYTHING]),
    "tp2": ({"tp": 2}, 1, [EVERYTHING]),
    "pp2": ({"pp": 2}, None, [("tokens", "position_ids"), ("labels", "loss_mask")]),
    # The MTP layer embeds tokens on the last stage.
    "pp2_mtp": ({"pp": 2}, 1, [("tokens", "position_ids"), EVERYTHING]),
    "pp3": ({"pp": 3}, None, [("tokens", "position_ids"), (), ("labels", "loss_mask")]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_each_rank_gets_its_part_of_the_sample_unchanged(case: str) -> None:
    layout, mtp, fields = CASES[case]
    nproc = max([1, *layout.values()])
    for ranks, batch in run_distributed(
        "tests.training.step_worker:part", nproc, layout, SAMPLE, mtp
    ):
        places = ZIGZAG[ranks["cp"]] if layout.get("cp") else list(range(LENGTH))
        read = {name for name, tensor in batch.items() if tensor is not None}
        assert batch.keys() == SAMPLE.keys()
        assert read == set(fields[ranks["pp"]])
        for name in read:
            assert torch.equal(batch[name], SAMPLE[name][:, places]), (name, ranks)


class Recorder(torch.nn.Module):
    """A model that keeps its arguments and returns a loss for each token."""

    vp_stage = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.args, self.kwargs = args, kwargs
        return torch.arange(2.0 * LENGTH).view(args[0].shape)


@pytest.fixture
def arguments(megatron_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", None)  # restored afterwards
    use_arguments(micro_batch=2, length=LENGTH)
    machine = SimpleNamespace(validate_result=lambda **_: None)
    monkeypatch.setattr("mellum2_megatron.training.step.get_rerun_state_machine", lambda: machine)


def test_model_gets_every_field_and_the_loss_counts_by_the_mask(arguments: None) -> None:
    model = Recorder()
    output, loss_function = forward_step(iter([dict(SAMPLE)]), model)
    tokens, positions, attention_mask = model.args
    assert torch.equal(tokens, SAMPLE["tokens"])
    assert torch.equal(positions, SAMPLE["position_ids"])
    assert attention_mask is None
    assert model.kwargs.keys() == {"labels", "loss_mask", "packed_seq_params"}
    assert model.kwargs["packed_seq_params"] is None
    assert torch.equal(model.kwargs["labels"], SAMPLE["labels"])
    # The MTP loss is masked inside the model.
    assert torch.equal(model.kwargs["loss_mask"], SAMPLE["loss_mask"])
    loss, count, log = loss_function(output)
    counted = [number for number in range(2 * LENGTH) if number % 3]
    assert (loss, count) == (sum(counted), len(counted))
    assert log.keys() == {"lm loss"}
    assert log["lm loss"].tolist() == [sum(counted), len(counted)]


def test_packs_of_a_micro_batch_follow_each_other(arguments: None) -> None:
    """Two packs: documents of 5 and 6 tokens in rooms of 8, and one of 14 in a room of 16."""
    bounds = {
        "cu_seqlens": torch.tensor([[0, 5, 11], [0, 14, 14]], dtype=torch.int32),
        "cu_seqlens_padded": torch.tensor([[0, 8, 16], [0, 16, 16]], dtype=torch.int32),
    }
    model = Recorder()
    output, loss_function = forward_step(iter([SAMPLE | bounds]), model, documents=True)
    tokens, positions, _ = model.args
    assert tokens.tolist() == SAMPLE["tokens"].view(1, -1).tolist()
    assert positions.tolist() == SAMPLE["position_ids"].view(1, -1).tolist()
    for name in ("labels", "loss_mask"):
        assert model.kwargs[name].tolist() == SAMPLE[name].view(1, -1).tolist()
    packed = model.kwargs["packed_seq_params"]
    for real in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert real.tolist() == [0, 5, 11, 25]
    for padded in (packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded):
        assert padded.tolist() == [0, 8, 16, 32]
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (16, 16)
    assert loss_function(output)[0] == sum(n for n in range(2 * LENGTH) if n % 3)


def test_losses_of_sources_are_summed_apart(arguments: None) -> None:
    model = Recorder().eval()
    sample = {**SAMPLE, "source": torch.tensor([1, 0])}
    output, loss_function = forward_step(iter([sample]), model, validation_sets=("a", "b"))
    _, _, log = loss_function(output)
    rows = [
        [number for number in range(row * LENGTH, (row + 1) * LENGTH) if number % 3]
        for row in (0, 1)
    ]
    assert list(log) == ["lm loss/a", "lm loss/b", "lm loss"]
    assert log["lm loss/a"].tolist() == [sum(rows[1]), len(rows[1])]
    assert log["lm loss/b"].tolist() == [sum(rows[0]), len(rows[0])]
    assert log["lm loss"].tolist() == [sum(rows[0] + rows[1]), len(rows[0] + rows[1])]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_rejected(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's machine gets the sum, and a function that rejects it."""
    seen: list[tuple[float, bool]] = []

    def validate(*, result: torch.Tensor, rejection_func: Any, message: str) -> None:
        seen.append((float(result), bool(rejection_func(result))))

    machine = SimpleNamespace(validate_result=validate)
    monkeypatch.setattr("mellum2_megatron.training.step.get_rerun_state_machine", lambda: machine)
    ones = torch.ones(1, 2)
    sum_loss(ones, torch.tensor([[1.0, 2.0]]))
    sum_loss(ones, torch.tensor([[1.0, bad]]))
    assert seen[0] == (3.0, False)
    assert seen[1][1]


def test_a_validation_hands_on_the_sample_and_its_losses(arguments: None) -> None:
    seen: list[tuple[Any, torch.Tensor]] = []

    def keep(sample: Any, loss: torch.Tensor) -> None:
        seen.append((sample, loss))

    model = Recorder()
    for _ in ("training", "validation"):
        sample = {**SAMPLE, "sample": torch.tensor([4, 9])}
        output, loss_function = forward_step(iter([sample]), model, on_validation=keep)
        assert len(seen) == 0  # the output may be a plan; the loss function gets the losses
        loss_function(output)
        model.eval()
    ((got, loss),) = seen
    assert got["sample"].tolist() == [4, 9]
    assert loss is output
