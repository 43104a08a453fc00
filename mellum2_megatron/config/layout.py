"""A parallel layout: how many ranks split what, and whether that fits a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.architecture import Mellum2Architecture, Parameter
from mellum2_megatron.common.errors import InputError

CpCommType = Literal["p2p", "all_gather"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Ways of each parallelism.

    Attention runs on ``tp * cp * pp * dp`` ranks; the same ranks hold experts as ``etp * ep * pp *
    expert dp``.

    Attributes:
        tp: tensor parallel ways of attention, embedding and output layer.
        sp: sequence parallelism, the activations between tensor-parallel regions split along the
            sequence. Needed with ``tp > 1``: Megatron refuses to train an MoE without it
            (megatron/core/transformer/moe/moe_layer.py:629, 0.19.2).
        pp: pipeline stages.
        vpp: virtual stages a pipeline rank (interleaved schedule); 1 is the plain schedule.
        ep: expert parallel ways, the experts of a layer are divided among them.
        etp: tensor parallel ways inside an expert.
        cp: context parallel ways, each sequence is divided among them.
        dp: data parallel ways; None takes what the world size leaves.
        dispatcher: how tokens travel to their experts.

    Raises:
        InputError: a value below 1, or a combination that no model can run with.
    """

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int | None = None
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(
                    f"layout.{name}={value}", rule="must be 1 or more", fix=f"set layout.{name}=1"
                )
        if self.tp > 1 and not self.sp:
            raise InputError(
                f"layout.tp={self.tp} with layout.sp=false",
                rule="an MoE model trains with tensor parallelism only if sequence parallelism is on",
                fix="set layout.sp=true",
            )
        if self.sp and self.tp == 1:
            raise InputError(
                "layout.sp=true with layout.tp=1",
                rule="sequence parallelism divides activations among tensor-parallel ranks",
                fix="set layout.sp=false, or layout.tp=2 or more",
            )
        if self.vpp > 1 and self.pp == 1:
            raise InputError(
                f"layout.vpp={self.vpp} with layout.pp=1",
                rule="virtual stages interleave the stages of a pipeline",
                fix="set layout.vpp=1, or layout.pp=2 or more",
            )

    @property
    def smallest_world_size(self) -> int:
        """The fewest ranks this layout can run on."""
        ranks = self.pp * math.lcm(self.tp * self.cp, self.ep * self.etp)
        return (
            math.lcm(ranks, self.tp * self.cp * self.pp * self.dp) if self.dp is not None else ranks
        )

    @property
    def world_size(self) -> int | None:
        """The ranks that ``dp`` asks for, or None where the world size decides."""
        return None if self.dp is None else self.tp * self.cp * self.pp * self.dp

    def data_parallel(self, world_size: int) -> int:
        """Return the data-parallel ways on ``world_size`` ranks: the ranks that see different
        sequences."""
        return world_size // (self.tp * self.cp * self.pp)

    def expert_data_parallel(self, world_size: int) -> int:
        """Return how many ranks hold the same experts."""
        return world_size // (self.ep * self.etp * self.pp)

    def cp_comm_types(self, architecture: Mellum2Architecture) -> tuple[CpCommType, ...]:
        """Return the context-parallel communication of every layer.

        Sliding layers can only gather: Transformer Engine's p2p has no window, and its a2a needs KV
        heads divisible by ``cp`` (transformer_engine/pytorch .../context_parallel.py:4644-4647 and
        5688-5694, 2.20.2). Full layers use p2p, which overlaps. Both keep the same zigzag split of
        the sequence, so they mix. The MTP layer reads the first entry (its layer number is 1),
        which therefore gathers if either of the two slides.
        """
        kinds: list[CpCommType] = [
            "all_gather" if kind == "sliding_attention" else "p2p"
            for kind in architecture.layer_types
        ]
        if "sliding_attention" in architecture.mtp_layer_types:
            kinds[0] = "all_gather"
        return tuple(kinds)

    def problems(
        self, architecture: Mellum2Architecture, *, world_size: int, sequence_length: int
    ) -> list[InputError]:
        """Return what keeps this layout from running the model, as errors that are not raised, each
        with what works."""
        found = [
            *self._model_problems(architecture),
            *self._sequence_problems(sequence_length),
            *self._world_problems(architecture, world_size),
        ]
        return [problem for problem in found if problem is not None]

    def validate(
        self, architecture: Mellum2Architecture, *, world_size: int, sequence_length: int
    ) -> None:
        """Raise the first of :meth:`problems`.

        Raises:
            InputError: the layout does not fit the model, the sequence or the number of ranks.
        """
        for problem in self.problems(
            architecture, world_size=world_size, sequence_length=sequence_length
        ):
            raise problem

    def _model_problems(self, architecture: Mellum2Architecture) -> list[InputError | None]:
        layers = {"num_hidden_layers": architecture.num_hidden_layers}
        # With more ranks than KV heads Megatron replicates them, and Muon stops splitting Q, K and
        # V with no more than a DEBUG line (megatron/core/optimizer/emerging_optimizers.py:294-324,
        # 0.19.2): refused.
        heads = {
            "num_attention_heads": architecture.num_attention_heads,
            "num_key_value_heads": architecture.num_key_value_heads,
            "vocab_size": architecture.vocab_size,
        }
        return [
            _divides("tp", self.tp, heads),
            _divides("pp", self.pp, layers),
            _divides(
                "vpp",
                self.vpp,
                {"num_hidden_layers / pp": architecture.num_hidden_layers // self.pp},
            ),
            _divides("ep", self.ep, {"num_experts": architecture.num_experts}),
            _divides(
                "etp", self.etp, {"moe_intermediate_size": architecture.moe_intermediate_size}
            ),
        ]

    def _sequence_problems(self, sequence_length: int) -> list[InputError | None]:
        if self.cp > 1 and sequence_length % (2 * self.cp):
            working = [
                cp
                for cp in range(1, sequence_length + 1)
                if cp == 1 or sequence_length % (2 * cp) == 0
            ]
            return [
                InputError(
                    f"layout.cp={self.cp} with data.sequence_length={sequence_length}",
                    rule="each context-parallel rank takes two chunks of the sequence, so 2 * cp must divide it",
                    fix=f"{_use('cp', self.cp, working)}, or a sequence length that is a multiple of {2 * self.cp}",
                )
            ]
        if sequence_length // self.cp % self.tp:
            return [
                InputError(
                    f"layout.tp={self.tp} with data.sequence_length={sequence_length}, layout.cp={self.cp}",
                    rule="sequence parallelism divides a rank's part of the sequence among the tensor-parallel ranks",
                    fix=_use("tp", self.tp, _divisors(sequence_length // self.cp)),
                )
            ]
        return []

    def _world_problems(
        self, architecture: Mellum2Architecture, world_size: int
    ) -> list[InputError | None]:
        dense, expert = self.tp * self.cp * self.pp, self.ep * self.etp * self.pp
        if world_size % dense:
            return [
                InputError(
                    f"layout.tp={self.tp}, layout.cp={self.cp}, layout.pp={self.pp} on {world_size} ranks",
                    rule=f"tp * cp * pp = {dense} must divide the number of ranks",
                    fix=f"start {_nearest_multiples(world_size, self.smallest_world_size)} ranks, "
                    "or lower one of the three",
                )
            ]
        if world_size % expert:
            experts = _divisors(architecture.num_experts)
            working = [ep for ep in experts if world_size % (ep * self.etp * self.pp) == 0]
            return [
                InputError(
                    f"layout.ep={self.ep}, layout.etp={self.etp}, layout.pp={self.pp} on {world_size} ranks",
                    rule=f"ep * etp * pp = {expert} must divide the number of ranks",
                    fix=(f"{_use('ep', self.ep, working)}, or " if working else "")
                    + f"start {_nearest_multiples(world_size, self.smallest_world_size)} ranks",
                )
            ]
        if self.dp is not None and self.dp != world_size // dense:
            return [
                InputError(
                    f"layout.dp={self.dp} on {world_size} ranks",
                    rule=f"tp * cp * pp * dp = {self.world_size} must equal the number of ranks",
                    fix=f"set layout.dp={world_size // dense} (or null), or start {self.world_size} ranks",
                )
            ]
        return []


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Whether Muon updates ``parameter``: all matrices but the embedding and the head (report
    §3)."""
    return len(parameter.shape) == 2 and parameter.component not in ("embedding", "output head")


def pipeline_stages(
    parameter: Parameter, architecture: Mellum2Architecture, layout: Layout
) -> set[int]:
    """Return the pipeline stages that hold ``parameter``; virtual stages are dealt out in turn."""
    last = layout.pp - 1
    if parameter.component == "embedding":
        return (
            {0, last} if architecture.num_mtp_layers else {0}
        )  # the MTP layer embeds the next token itself
    if parameter.mtp or parameter.layer is None:
        return {last}
    return {parameter.layer * layout.pp * layout.vpp // architecture.num_hidden_layers % layout.pp}


def _divides(name: str, ways: int, sizes: dict[str, int]) -> InputError | None:
    broken = {what: size for what, size in sizes.items() if size % ways}
    if not broken:
        return None
    return InputError(
        f"layout.{name}={ways}",
        rule="must divide " + " and ".join(f"{what} ({size})" for what, size in broken.items()),
        fix=_use(name, ways, _divisors(math.gcd(*sizes.values()))),
    )


def _use(name: str, wanted: int, working: Iterable[int]) -> str:
    """Return ``use layout.ep=4 or 8``: the nearest working values at or below and above the wanted
    one."""
    ordered = sorted(working)
    below = [value for value in ordered if value <= wanted][-1:]
    above = [value for value in ordered if value > wanted][:1]
    return f"use layout.{name}=" + " or ".join(str(value) for value in below + above)


def _nearest_multiples(count: int, unit: int) -> str:
    below, above = count // unit * unit, (count // unit + 1) * unit
    return f"{below} or {above}" if below else str(above)


def _divisors(size: int) -> list[int]:
    return [value for value in range(1, size + 1) if size % value == 0]
