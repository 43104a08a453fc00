"""A parallel layout: degrees of each parallelism, and checks that they fit model and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mellum2_megatron.architecture import Mellum2Architecture, Parameter
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import INT32_MAX, check_fields, divisors, require

CpCommType = Literal["p2p", "all_gather"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Degree of each parallelism, in ways: the number of parts, one for each rank.

    Attention runs on ``tp * cp * pp * dp`` ranks. The same ranks hold the experts as
    ``etp * ep * pp * expert dp``.

    Attributes:
        tp: tensor-parallel ways of attention, embedding and output layer, default 1.
        sp: sequence parallelism, default false: outside tensor-parallel regions, split activations
            along the sequence. Required with ``tp > 1``: Megatron refuses to train an MoE without
            it (megatron/core/transformer/moe/moe_layer.py:629, 0.19.2).
        pp: pipeline stages, default 1.
        vpp: virtual stages of each pipeline rank (interleaved schedule); 1 (default) is the plain
            schedule.
        ep: expert-parallel ways, default 1; the ranks divide the experts of a layer.
        etp: tensor-parallel ways inside an expert, default 1.
        cp: context-parallel ways, default 1; the ranks divide each sequence.
        dp: data-parallel ways; None (default): all ranks that the other parallelisms leave.
        dispatcher: Megatron's way of sending tokens to the ranks of their experts, default
            ``alltoall``. ``flex`` sends through a library that is made for it.
        dispatcher_backend: library of ``flex``. ``hybridep`` (default) or ``deepep``, which send a
            token once to each rank that needs it, and not once for each of its experts.
        dispatcher_sms: multiprocessors of a GPU that the library takes from other work; None
            (default): its own choice.
        overlap_expert_comm: overlap the exchange of tokens of one micro-batch with the computation
            of another, default false. The numbers are those of the plain schedule: one micro-batch
            goes forward, layer by layer, while the one before it goes backward.
        delay_wgrad: with ``overlap_expert_comm``, compute gradients of weights later, while tokens
            are exchanged; default false.

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
    dispatcher_backend: Literal["hybridep", "deepep"] = "hybridep"
    dispatcher_sms: int | None = None
    overlap_expert_comm: bool = False
    delay_wgrad: bool = False

    def __post_init__(self) -> None:
        check_fields("layout", self)
        for key, value in (
            ("layout.tp", self.tp),
            ("layout.pp", self.pp),
            ("layout.vpp", self.vpp),
            ("layout.ep", self.ep),
            ("layout.etp", self.etp),
            ("layout.cp", self.cp),
            ("layout.dp", self.dp),
        ):
            require(
                value is None or value >= 1,
                f"{key}={value}",
                rule="must be 1 or more",
                fix=f"set {key}=1",
            )
        ranks = math.prod((self.tp, self.cp, self.pp, self.ep, self.etp, self.vpp, self.dp or 1))
        require(
            ranks <= INT32_MAX,
            f"layout.tp={self.tp}, cp={self.cp}, pp={self.pp}, vpp={self.vpp}, ep={self.ep}, "
            f"etp={self.etp}, dp={self.dp}",
            rule=f"the product of all degrees must not exceed {INT32_MAX}",
            fix="lower them",
        )
        require(
            self.tp == 1 or self.sp,
            f"layout.tp={self.tp} with layout.sp=false",
            rule="an MoE model trains with tensor parallelism only if sequence parallelism is on",
            fix="set layout.sp=true",
        )
        require(
            self.tp > 1 or not self.sp,
            "layout.sp=true with layout.tp=1",
            rule="sequence parallelism divides activations among tensor-parallel ranks",
            fix="set layout.sp=false, or layout.tp=2 or more",
        )
        require(
            self.pp > 1 or self.vpp == 1,
            f"layout.vpp={self.vpp} with layout.pp=1",
            rule="virtual stages interleave the stages of a pipeline",
            fix="set layout.vpp=1, or layout.pp=2 or more",
        )
        self._check_exchange()

    def _check_exchange(self) -> None:
        """Refuse settings of the exchange of tokens that Megatron refuses or leaves unread."""
        for key, given in (
            ("dispatcher_backend", self.dispatcher_backend != "hybridep"),
            ("dispatcher_sms", self.dispatcher_sms is not None),
        ):
            require(
                not given or self.dispatcher == "flex",
                f"layout.{key}={getattr(self, key)} with layout.dispatcher={self.dispatcher}",
                rule="is a setting of layout.dispatcher=flex",
                fix="set layout.dispatcher=flex, or leave it out",
            )
        if self.dispatcher_sms is not None:
            require(
                1 <= self.dispatcher_sms <= 128,
                f"layout.dispatcher_sms={self.dispatcher_sms}",
                rule="a GPU has 132 multiprocessors or fewer, and most are needed to compute",
                fix="use 16 to 32, or null",
            )
        require(
            self.overlap_expert_comm or not self.delay_wgrad,
            "layout.delay_wgrad=true with layout.overlap_expert_comm=false",
            rule="it fills the time in which tokens are exchanged "
            "(megatron/core/transformer/transformer_config.py:2750, 0.19.2)",
            fix="set layout.overlap_expert_comm=true or layout.delay_wgrad=false",
        )
        if not self.overlap_expert_comm:
            return
        require(
            self.ep > 1,
            "layout.overlap_expert_comm=true with layout.ep=1",
            rule="one rank holds all experts and exchanges nothing",
            fix="set layout.ep=2 or more, or layout.overlap_expert_comm=false",
        )
        require(
            self.dispatcher != "allgather",
            "layout.overlap_expert_comm=true with layout.dispatcher=allgather",
            rule="only alltoall and flex overlap "
            "(megatron/core/transformer/transformer_config.py:2683, 0.19.2)",
            fix="set layout.dispatcher=alltoall",
        )
        require(
            self.pp == 1 or self.vpp > 1,
            f"layout.overlap_expert_comm=true with layout.pp={self.pp}, layout.vpp=1",
            rule="a pipeline overlaps in the interleaved schedule only "
            "(megatron/core/transformer/transformer_config.py:2674, 0.19.2)",
            fix="set layout.vpp=2 or more, or layout.pp=1",
        )

    @property
    def smallest_world_size(self) -> int:
        """Smallest number of ranks that this layout can run on."""
        # Attention and experts divide the ranks of a stage independently, so both must divide it.
        ranks = self.pp * math.lcm(self.tp * self.cp, self.ep * self.etp)
        return ranks if self.world_size is None else math.lcm(ranks, self.world_size)

    @property
    def world_size(self) -> int | None:
        """Number of ranks with the given ``dp``; None if ``dp`` is None."""
        return None if self.dp is None else self.tp * self.cp * self.pp * self.dp

    def data_parallel(self, world_size: int) -> int:
        """Return the number of ranks, of ``world_size``, that train on different sequences."""
        return world_size // (self.tp * self.cp * self.pp)

    def expert_data_parallel(self, world_size: int) -> int:
        """Return the number of ranks, of ``world_size``, that hold the same experts."""
        return world_size // (self.ep * self.etp * self.pp)

    def cp_comm_types(self, architecture: Mellum2Architecture) -> tuple[CpCommType, ...]:
        """Return the context-parallel communication of every layer.

        Sliding layers gather: Transformer Engine's p2p has no window, and its a2a needs KV heads
        divisible by ``cp`` (transformer_engine/pytorch .../context_parallel.py:4644-4647 and
        5688-5694, 2.20.2). Full layers use p2p, which overlaps with compute. One model can mix
        them, because both take the same zigzag split of the sequence.
        """
        kinds: list[CpCommType] = [
            "all_gather" if kind == "sliding_attention" else "p2p"
            for kind in architecture.layer_types
        ]
        # Megatron gives the MTP layer number 1, so it reads the first entry too. That entry must
        # gather if either of the two layers slides.
        if "sliding_attention" in architecture.mtp_layer_types:
            kinds[0] = "all_gather"
        return tuple(kinds)

    def problems(
        self, architecture: Mellum2Architecture, *, world_size: int, sequence_length: int
    ) -> list[InputError]:
        """Return an error, not raised, for each misfit of layout, model, sequence and ranks.

        Each fix names the nearest values that work.

        Args:
            architecture: the model.
            world_size: number of ranks.
            sequence_length: tokens of one sequence.
        """
        problems = [
            *self._model_problems(architecture),
            *self._sequence_problems(sequence_length),
            *self._world_problems(architecture, world_size),
        ]
        return [problem for problem in problems if problem is not None]

    def validate(
        self, architecture: Mellum2Architecture, *, world_size: int, sequence_length: int
    ) -> None:
        """Raise the first of `problems`; the arguments are the same.

        Raises:
            InputError: the layout does not fit the model, the sequence or the number of ranks.
        """
        for problem in self.problems(
            architecture, world_size=world_size, sequence_length=sequence_length
        ):
            raise problem

    def _model_problems(self, architecture: Mellum2Architecture) -> list[InputError | None]:
        # More tp ranks than KV heads would do for Megatron, which replicates the heads. But Muon
        # then stops splitting Q, K and V, and logs that at DEBUG level only
        # (megatron/core/optimizer/emerging_optimizers.py:294-324, 0.19.2).
        sizes_by_tp = {
            "num_attention_heads": architecture.num_attention_heads,
            "num_key_value_heads": architecture.num_key_value_heads,
            "vocab_size": architecture.vocab_size,
            **architecture.variant_widths,
        }
        if architecture.latent_attention is not None:
            del sizes_by_tp["num_key_value_heads"]
            sizes_by_tp |= architecture.latent_attention.down_widths
        layers = architecture.num_hidden_layers
        return [
            _divides("tp", self.tp, sizes_by_tp),
            _divides("pp", self.pp, {"num_hidden_layers": layers}),
            _divides("vpp", self.vpp, {"num_hidden_layers / pp": layers // self.pp}),
            *self._expert_problems(architecture),
        ]

    def _expert_problems(self, architecture: Mellum2Architecture) -> list[InputError | None]:
        if architecture.has_experts:
            width = {"moe_intermediate_size": architecture.moe_intermediate_size}
            return [
                _divides("ep", self.ep, {"num_experts": architecture.num_experts}),
                _divides("etp", self.etp, width),
            ]
        return [
            InputError(
                f"layout.{name}={ways}",
                rule="every layer is dense (architecture.mlp_layer_types), so there are no "
                "experts to divide",
                fix=f"use layout.{name}=1",
            )
            for name, ways in (("ep", self.ep), ("etp", self.etp))
            if ways > 1
        ]

    def _sequence_problems(self, sequence_length: int) -> list[InputError | None]:
        given = f"data.sequence_length={sequence_length}"
        # A late query sees more keys than an early one, so a rank takes an early and a late chunk.
        if self.cp > 1 and sequence_length % (2 * self.cp):
            halves = [] if sequence_length % 2 else divisors(sequence_length // 2)
            working = sorted({1, *halves})
            return [
                InputError(
                    f"layout.cp={self.cp} with {given}",
                    rule="each context-parallel rank takes two chunks of the sequence, "
                    "so 2 * cp must divide it",
                    fix=f"{_use('cp', self.cp, working)}, "
                    f"or a sequence length that is a multiple of {2 * self.cp}",
                )
            ]
        # Sequence parallelism divides what context parallelism leaves of a sequence.
        if sequence_length // self.cp % self.tp:
            return [
                InputError(
                    f"layout.tp={self.tp} with {given}, layout.cp={self.cp}",
                    rule="sequence parallelism divides a rank's part of the sequence "
                    "among the tensor-parallel ranks",
                    fix=_use("tp", self.tp, divisors(sequence_length // self.cp)),
                )
            ]
        return []

    def _world_problems(
        self, architecture: Mellum2Architecture, world_size: int
    ) -> list[InputError | None]:
        # Attention and experts divide the same ranks independently. What either leaves is its
        # own data parallelism.
        dense, expert = self.tp * self.cp * self.pp, self.ep * self.etp * self.pp
        unit = math.lcm(dense, expert)
        below, above = world_size // unit * unit, (world_size // unit + 1) * unit
        fix_ranks = f"start {below} or {above} ranks" if below else f"start {above} ranks"
        fixed = world_size if self.world_size is None else self.world_size
        if self.dp is not None:
            fix_ranks = f"set layout.dp=null and {fix_ranks}"
        if fixed != world_size and (fixed % expert == 0 or world_size % unit == 0):
            fixes = []
            if world_size % unit == 0:
                fixes.append(f"set layout.dp={world_size // dense} (or null)")
            if fixed % expert == 0:
                fixes.append(f"start {fixed} ranks")
            if world_size % unit:
                fixes.append(fix_ranks)
            return [
                InputError(
                    f"layout.dp={self.dp} on {world_size} ranks",
                    rule=f"tp * cp * pp * dp = {fixed} must equal the number of ranks",
                    fix=", or ".join(fixes),
                )
            ]
        if world_size % dense:
            return [
                InputError(
                    f"layout.tp={self.tp}, layout.cp={self.cp}, layout.pp={self.pp} "
                    f"on {world_size} ranks",
                    rule=f"tp * cp * pp = {dense} must divide the number of ranks",
                    fix=f"{fix_ranks}, or lower one of the three",
                )
            ]
        if world_size % expert:
            # Any ep works that divides the experts and fits the ranks at the given etp and pp.
            experts = divisors(architecture.num_experts)
            working = [ep for ep in experts if world_size % (ep * self.etp * self.pp) == 0]
            if fixed != world_size:
                working = []  # the number of ranks would be wrong still
            return [
                InputError(
                    f"layout.ep={self.ep}, layout.etp={self.etp}, layout.pp={self.pp} "
                    f"on {world_size} ranks",
                    rule=f"ep * etp * pp = {expert} must divide the number of ranks",
                    fix=f"{_use('ep', self.ep, working)}, or {fix_ranks}" if working else fix_ranks,
                )
            ]
        return []


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Return true for the matrices that Muon updates: all but embedding and head (report §3)."""
    return len(parameter.shape) == 2 and parameter.component not in ("embedding", "output head")


def pipeline_stages(
    parameter: Parameter, architecture: Mellum2Architecture, layout: Layout
) -> set[int]:
    """Return the pipeline stages that hold ``parameter``.

    Virtual stages are dealt out to the pipeline ranks in turn.
    """
    last = layout.pp - 1
    if parameter.component == "embedding":
        # The MTP layer, on the last stage, embeds the next token with a copy of its own.
        return {0, last} if architecture.num_mtp_layers else {0}
    if parameter.mtp or parameter.layer is None:  # MTP head, final norm and output head
        return {last}
    # Chunk of the layer among pp * vpp equal chunks; chunk i lies on stage i mod pp.
    chunk = parameter.layer * layout.pp * layout.vpp // architecture.num_hidden_layers
    return {chunk % layout.pp}


def _divides(name: str, ways: int, sizes: dict[str, int]) -> InputError | None:
    """Return the error if a degree of the layout does not divide all of the named sizes."""
    broken = [f"{field} ({size})" for field, size in sizes.items() if size % ways]
    if not broken:
        return None
    return InputError(
        f"layout.{name}={ways}",
        rule=f"must divide {' and '.join(broken)}",
        fix=_use(name, ways, divisors(math.gcd(*sizes.values()))),
    )


def _use(name: str, wanted: int, working: Iterable[int]) -> str:
    """Return ``use layout.ep=4 or 8``: the nearest working values below and above ``wanted``."""
    ordered = sorted(working)
    below = [value for value in ordered if value <= wanted][-1:]
    above = [value for value in ordered if value > wanted][:1]
    return f"use layout.{name}=" + " or ".join(str(value) for value in below + above)
