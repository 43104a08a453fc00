"""The one table that relates Megatron's tensors to Hugging Face's, and everything derived from it.

The table has one row per kind of weight. A row names the Megatron key, the Hugging Face names whose
tensors it is made of, both shapes in the architecture's own words, and the transform between them.
`derive(architecture)` expands the rows into `Entry` objects: one per slice of a Megatron tensor
that can be read, converted and written on its own. Import, export, validation and manifests all
walk that list, so a weight can be neither forgotten nor converted twice.

Sources of the layouts:
  Megatron keys: ``sharded_state_dict`` of ``GPTModel`` (megatron-core 0.19.2). All layers share one
  tensor with a leading layer axis (``transformer_block.py:760-785``), experts follow with an expert
  axis (``moe/experts.py:912-954``), the MTP layer's ``mtp_model_layer`` is saved as
  ``transformer_layer`` (``multi_token_prediction.py:1551-1558``).
  Hugging Face names: the released checkpoints; fused experts are transformers' in-memory layout
  (``transformers/models/mellum/modeling_mellum.py:278-284``, 5.23).

Shape letters: V vocabulary, H hidden, D head dimension, Q query heads * D, K key/value heads * D, E
experts, F expert intermediate size, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mellum2_megatron.architecture import Shape as Shape

if TYPE_CHECKING:
    from torch import Tensor

    from mellum2_megatron.architecture import Mellum2Architecture


class Transform(Protocol):
    """How the Hugging Face tensors of an entry become one Megatron slice, and back; both only move
    bytes."""

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        """Return the Megatron slice made of ``parts``."""
        ...

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        """Return the Hugging Face tensors a Megatron slice is made of, in the row's order."""
        ...


class Same:
    """One tensor, the same on both sides."""

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        return parts[0]

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        return [tensor]


class GroupedHeads:
    """q [Q, H], k [K, H], v [K, H] <-> linear_qkv [Q + 2K, H].

    Megatron stores per key/value group: the group's query heads, its key head, its value head
    (``megatron/core/transformer/attention.py``, ``get_query_key_value_tensors``).
    """

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        import torch

        groups, hidden = architecture.num_key_value_heads, architecture.hidden_size
        return torch.cat([part.reshape(groups, -1, hidden) for part in parts], dim=1).reshape(
            -1, hidden
        )

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        import torch

        groups, hidden, head = (
            architecture.num_key_value_heads,
            architecture.hidden_size,
            architecture.head_dim,
        )
        queries = architecture.num_attention_heads // groups * head
        parts = torch.split(
            tensor.reshape(groups, queries + 2 * head, hidden), [queries, head, head], dim=1
        )
        return [part.reshape(-1, hidden) for part in parts]


class StackedRows:
    """gate [F, H], up [F, H] <-> linear_fc1 [2F, H]: Megatron's gated unit is ``act(first half) *
    second half``."""

    def join(self, parts: list[Tensor], architecture: Mellum2Architecture) -> Tensor:
        import torch

        return torch.cat(parts, dim=0)

    def split(self, tensor: Tensor, architecture: Mellum2Architecture) -> list[Tensor]:
        return list(tensor.chunk(2, dim=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of weight.

    Attributes:
        megatron: Megatron key, below the row's place (see `PLACES`).
        shape: shape letters of one layer's (and one expert's) Megatron slice.
        huggingface: (name, shape letters) of the tensors it is made of, in the transform's order.
        transform: how they relate.
    """

    megatron: str
    shape: str
    huggingface: tuple[tuple[str, str], ...]
    transform: Transform

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.huggingface[0][0]

    @property
    def padded_vocabulary(self) -> bool:
        """Megatron may store more rows than the vocabulary has (``--make-vocab-size-divisible-by``
        times TP)."""
        return self.shape.startswith("V")


def _row(
    megatron: str, shape: str, *huggingface: tuple[str, str], transform: Transform | None = None
) -> Row:
    return Row(
        megatron=megatron, shape=shape, huggingface=huggingface, transform=transform or Same()
    )


EMBEDDING = (_row("embedding.word_embeddings.weight", "V H", ("model.embed_tokens.weight", "V H")),)

# The same rows serve every decoder layer and the MTP layer's transformer layer.
LAYER = (
    _row("self_attention.linear_qkv.layer_norm_weight", "H", ("input_layernorm.weight", "H")),
    _row(
        "self_attention.linear_qkv.weight",
        "Q+K+K H",
        ("self_attn.q_proj.weight", "Q H"),
        ("self_attn.k_proj.weight", "K H"),
        ("self_attn.v_proj.weight", "K H"),
        transform=GroupedHeads(),
    ),
    _row("self_attention.q_layernorm.weight", "D", ("self_attn.q_norm.weight", "D")),
    _row("self_attention.k_layernorm.weight", "D", ("self_attn.k_norm.weight", "D")),
    _row("self_attention.linear_proj.weight", "H Q", ("self_attn.o_proj.weight", "H Q")),
    _row("pre_mlp_layernorm.weight", "H", ("post_attention_layernorm.weight", "H")),
    _row("mlp.router.weight", "E H", ("mlp.gate.weight", "E H")),
    _row(
        "mlp.experts.experts.linear_fc1.weight",
        "F+F H",
        ("mlp.experts.{expert}.gate_proj.weight", "F H"),
        ("mlp.experts.{expert}.up_proj.weight", "F H"),
        transform=StackedRows(),
    ),
    _row(
        "mlp.experts.experts.linear_fc2.weight",
        "H F",
        ("mlp.experts.{expert}.down_proj.weight", "H F"),
    ),
)

HEAD = (
    _row("decoder.final_layernorm.weight", "H", ("model.norm.weight", "H")),
    _row("output_layer.weight", "V H", ("lm_head.weight", "V H")),
)

# eh_proj's input columns are [enorm(embedding), hnorm(hidden)] on both sides.
MTP = (
    _row("mtp.layers.0.enorm.weight", "H", ("mtp.pre_fc_norm_embedding.weight", "H")),
    _row("mtp.layers.0.hnorm.weight", "H", ("mtp.pre_fc_norm_hidden.weight", "H")),
    _row("mtp.layers.0.eh_proj.weight", "H H+H", ("mtp.fc.weight", "H H+H")),
    _row("mtp.layers.0.final_layernorm.weight", "H", ("mtp.norm.weight", "H")),
)

# transformers' in-memory experts: (suffix, (released suffix, rows) of each expert's slice). Rows
# are in units of F.
FUSED_EXPERTS = (
    ("mlp.experts.gate_up_proj", "E F+F H", (("gate_proj", 0, "F H"), ("up_proj", 1, "F H"))),
    ("mlp.experts.down_proj", "E H F", (("down_proj", None, "H F"),)),
)


# Modules whose ``_extra_state`` object Megatron's load asks for and fails without, empty as it is
# outside FP8: the linears of either backend, and with Transformer Engine the norms too. {expert}:
# one per expert.
LAYER_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.experts.experts.linear_fc1{expert}",
    "mlp.experts.experts.linear_fc2{expert}",
)
HEAD_STATES = ("decoder.final_layernorm",)
MTP_STATES = tuple(
    f"mtp.layers.0.{module}" for module in ("enorm", "hnorm", "eh_proj", "final_layernorm")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a group of rows sits: its prefixes, and whether its Megatron tensors carry a layer
    axis."""

    rows: tuple[Row, ...]
    states: tuple[str, ...] = ()
    megatron: str = ""
    huggingface: str = ""
    layer_axis: bool = False
    mtp: bool = False


_MTP_LAYER = "mtp.layers.0.transformer_layer."

PLACES = (
    Place(rows=EMBEDDING),
    Place(
        rows=LAYER,
        states=LAYER_STATES,
        megatron="decoder.layers.",
        huggingface="model.layers.{layer}.",
        layer_axis=True,
    ),
    Place(rows=HEAD, states=HEAD_STATES),
    Place(
        rows=LAYER, states=LAYER_STATES, megatron=_MTP_LAYER, huggingface="mtp.layers.0.", mtp=True
    ),
    Place(rows=MTP, states=MTP_STATES, mtp=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One Hugging Face tensor of an entry, under its released name."""

    name: str
    shape: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One slice of one Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        key: Megatron key.
        global_shape: the whole Megatron tensor, leading layer and expert axes included.
        index: position on the leading axes: (), (layer,), (expert,) or (layer, expert).
        shape: the slice at ``index``.
        sources: the Hugging Face tensors, in the transform's order.
        group: entries with the same number belong together (one file): embedding, each layer, head,
            MTP.
    """

    key: str
    global_shape: Shape
    index: Shape
    shape: Shape
    sources: tuple[Source, ...]
    transform: Transform
    padded_vocabulary: bool
    group: int

    @property
    def offset(self) -> Shape:
        """Offset of the slice in the whole tensor."""
        return self.index + (0,) * len(self.shape)

    @property
    def extent(self) -> Shape:
        """Size of the slice in the whole tensor's axes: ones on the leading axes, then
        ``shape``."""
        return (1,) * len(self.index) + self.shape

    @property
    def label(self) -> str:
        """``decoder.layers.mlp.router.weight[3]``."""
        return f"{self.key}[{','.join(map(str, self.index))}]" if self.index else self.key


def derive(architecture: Mellum2Architecture) -> list[Entry]:
    """Expand the table for ``architecture``.

    Returns entries in the order a model is laid out: embedding, layers, final norm and head, MTP.
    Together they cover every Megatron tensor exactly and name every Hugging Face tensor once.

    Raises:
        ValueError: the table itself is inconsistent (a name twice, a Megatron slice twice); a
            programming error.
    """
    entries = list(_expand(architecture))
    _check_once([(entry.key, entry.index) for entry in entries], "Megatron slice")
    _check_once(
        [source.name for entry in entries for source in entry.sources], "Hugging Face tensor"
    )
    return entries


def megatron_shapes(entries: list[Entry]) -> dict[str, Shape]:
    """Return every Megatron key with its whole shape."""
    return {entry.key: entry.global_shape for entry in entries}


def huggingface_shapes(entries: list[Entry]) -> dict[str, Shape]:
    """Return every released Hugging Face tensor name with its shape."""
    return {source.name: source.shape for entry in entries for source in entry.sources}


def extra_states(architecture: Mellum2Architecture) -> list[str]:
    """Return the key of every ``_extra_state`` object, as ``ShardedObject.unique_key`` spells it.

    ``decoder.layers.self_attention.linear_qkv._extra_state/shard_3_28``: layer 3 of 28;
    ``shard_3.17_28.64`` for its expert 17 of 64; ``shard_0_1`` where there is one
    (``megatron/core/transformer/utils.py:218-233``).
    """
    keys = []
    for layer, place in _places(architecture):
        leading = [(layer, architecture.num_hidden_layers)] if place.layer_axis else []
        for module in place.states:
            per_expert = "{expert}" in module
            for expert in range(architecture.num_experts if per_expert else 1):
                axes = (
                    [*leading, (expert, architecture.num_experts)] if per_expert else leading
                ) or [(0, 1)]
                offset, shape = (".".join(map(str, axis)) for axis in zip(*axes, strict=True))
                keys.append(
                    f"{place.megatron}{module.format(expert='')}._extra_state/shard_{offset}_{shape}"
                )
    return keys


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedSlice:
    """Where a released expert tensor lies inside transformers' fused one: ``fused[expert,
    rows]``."""

    name: str
    expert: int
    rows: slice


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedTensor:
    """One fused expert tensor, and the released tensors it holds."""

    name: str
    shape: Shape
    slices: dict[str, FusedSlice]


def fused_experts(architecture: Mellum2Architecture) -> dict[str, FusedTensor]:
    """Return the fused expert tensors ``[E, ...]`` that may stand in for the released, unfused
    ones."""
    places = [
        place.huggingface.format(layer=layer)
        for layer, place in _places(architecture)
        if place.rows is LAYER
    ]
    sizes = _sizes(architecture)
    fused = {}
    for prefix in places:
        for suffix, shape, parts in FUSED_EXPERTS:
            name = prefix + suffix
            slices = {}
            for expert in range(architecture.num_experts):
                for part, half, part_shape in parts:
                    rows = _shape(part_shape, sizes)[0]
                    where = (
                        slice(0, rows) if half is None else slice(half * rows, (half + 1) * rows)
                    )
                    released = f"{prefix}mlp.experts.{expert}.{part}.weight"
                    slices[released] = FusedSlice(name=name, expert=expert, rows=where)
            fused[name] = FusedTensor(name=name, shape=_shape(shape, sizes), slices=slices)
    return fused


def _places(architecture: Mellum2Architecture) -> Iterator[tuple[int, Place]]:
    """Yield every (layer, place) of the model in order; the layer is 0 where there is no layer
    axis."""
    for place in PLACES:
        if place.mtp and not architecture.num_mtp_layers:
            continue
        for layer in range(architecture.num_hidden_layers if place.layer_axis else 1):
            yield layer, place


def _expand(architecture: Mellum2Architecture) -> Iterator[Entry]:
    sizes = _sizes(architecture)
    for group, (layer, place) in enumerate(_places(architecture)):
        for row in place.rows:
            leading = [(architecture.num_hidden_layers, layer)] if place.layer_axis else []
            shape = _shape(row.shape, sizes)
            for expert in range(architecture.num_experts if row.per_expert else 1):
                axes = [*leading, (architecture.num_experts, expert)] if row.per_expert else leading
                yield Entry(
                    key=place.megatron + row.megatron,
                    global_shape=tuple(size for size, _ in axes) + shape,
                    index=tuple(index for _, index in axes),
                    shape=shape,
                    sources=tuple(
                        Source(
                            name=(place.huggingface + name).format(layer=layer, expert=expert),
                            shape=_shape(letters, sizes),
                        )
                        for name, letters in row.huggingface
                    ),
                    transform=row.transform,
                    padded_vocabulary=row.padded_vocabulary,
                    group=group,
                )


def _sizes(architecture: Mellum2Architecture) -> dict[str, int]:
    return {
        "V": architecture.vocab_size,
        "H": architecture.hidden_size,
        "D": architecture.head_dim,
        "Q": architecture.num_attention_heads * architecture.head_dim,
        "K": architecture.num_key_value_heads * architecture.head_dim,
        "E": architecture.num_experts,
        "F": architecture.moe_intermediate_size,
    }


def _shape(letters: str, sizes: dict[str, int]) -> Shape:
    """``"Q+K+K H"`` -> (Q + 2K, H)."""
    return tuple(sum(sizes[letter] for letter in axis.split("+")) for axis in letters.split())


def _check_once(names: Iterable[object], what: str) -> None:
    seen: set[object] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} appears twice in the mapping table")
        seen.add(name)
