"""The one table that relates Megatron's tensors to Hugging Face's, and everything derived from it.

The table has one row per kind of weight. A row names a Megatron key, the Hugging Face tensors that
it is made of, the shapes of both in letters, and the transform between them.
`derive(architecture)` expands the rows into `Entry` objects: one per slice of a Megatron tensor
that can be read, converted and written on its own. Import, export, validation and manifests all
walk that list, so no weight is forgotten or converted twice.

Sources of the layouts:
  Megatron keys: ``sharded_state_dict`` of ``GPTModel`` (megatron-core 0.19.2, in
    ``core/transformer/``). All layers share one tensor with a leading layer axis
    (``transformer_block.py:760-785``). Experts follow with an expert axis
    (``moe/experts.py:912-954``). The MTP layer's ``mtp_model_layer`` is saved as
    ``transformer_layer`` (``multi_token_prediction.py:1551-1558``).
  Hugging Face names: the released checkpoints. Fused experts are transformers' layout in memory
    (``transformers/models/mellum/modeling_mellum.py:278-284``, 5.23).

Shape letters: V vocabulary, H hidden size, D head dimension, Q query heads * D, K key/value heads *
D, E experts, F expert intermediate size; in variants W width of a dense MLP, S of a shared expert,
others in `conversion.latent_rows`.
``Q+K+K H`` is a matrix of Q + 2K rows and H columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from conversion.latent_rows import LATENT_ATTENTION, LATENT_QUERIES, QUERIES, latent_sizes
from conversion.rows import GroupedHeads, Row, StackedRows, Transform, weight_row
from mellum2_megatron.architecture import Shape

if TYPE_CHECKING:
    from mellum2_megatron.architecture import Mellum2Architecture


EMBEDDING = (
    weight_row("embedding.word_embeddings.weight", "V H", ("model.embed_tokens.weight", "V H")),
)

ATTENTION = (
    # Transformer Engine fuses this norm into linear_qkv, and the torch backend keeps its key.
    weight_row("self_attention.linear_qkv.layer_norm_weight", "H", ("input_layernorm.weight", "H")),
    weight_row(
        "self_attention.linear_qkv.weight",
        "Q+K+K H",
        ("self_attn.q_proj.weight", "Q H"),
        ("self_attn.k_proj.weight", "K H"),
        ("self_attn.v_proj.weight", "K H"),
        transform=GroupedHeads(),
    ),
    # Per head: one weight [D] serves all of them.
    weight_row("self_attention.q_layernorm.weight", "D", ("self_attn.q_norm.weight", "D")),
    weight_row("self_attention.k_layernorm.weight", "D", ("self_attn.k_norm.weight", "D")),
    weight_row("self_attention.linear_proj.weight", "H Q", ("self_attn.o_proj.weight", "H Q")),
)

# The same rows serve every decoder layer and the MTP layer's transformer layer.
LAYER = (
    *ATTENTION,
    weight_row("pre_mlp_layernorm.weight", "H", ("post_attention_layernorm.weight", "H")),
    weight_row("mlp.router.weight", "E H", ("mlp.gate.weight", "E H")),
    # "experts" twice: the grouped module takes the key of its counterpart with a module per expert
    # (moe/experts.py:951-952).
    weight_row(
        "mlp.experts.experts.linear_fc1.weight",
        "F+F H",
        ("mlp.experts.{expert}.gate_proj.weight", "F H"),
        ("mlp.experts.{expert}.up_proj.weight", "F H"),
        transform=StackedRows(),
    ),
    weight_row(
        "mlp.experts.experts.linear_fc2.weight",
        "H F",
        ("mlp.experts.{expert}.down_proj.weight", "H F"),
    ),
)

# Two variants of a layer. With a dense MLP, whose norm Transformer Engine fuses:
DENSE_LAYER = (
    *ATTENTION,
    weight_row("mlp.linear_fc1.layer_norm_weight", "H", ("post_attention_layernorm.weight", "H")),
    weight_row(
        "mlp.linear_fc1.weight",
        "W+W H",
        ("mlp.gate_proj.weight", "W H"),
        ("mlp.up_proj.weight", "W H"),
        transform=StackedRows(),
    ),
    weight_row("mlp.linear_fc2.weight", "H W", ("mlp.down_proj.weight", "H W")),
)
# With a shared expert, whose right-hand names no release has: transformers has no place for it.
SHARED_EXPERT_LAYER = (
    *LAYER,
    weight_row(
        "mlp.shared_experts.linear_fc1.weight",
        "S+S H",
        ("mlp.shared_expert.gate_proj.weight", "S H"),
        ("mlp.shared_expert.up_proj.weight", "S H"),
        transform=StackedRows(),
    ),
    weight_row(
        "mlp.shared_experts.linear_fc2.weight", "H S", ("mlp.shared_expert.down_proj.weight", "H S")
    ),
)

# Embedding and head are two tensors: Mellum 2 does not tie them.
HEAD = (
    weight_row("decoder.final_layernorm.weight", "H", ("model.norm.weight", "H")),
    weight_row("output_layer.weight", "V H", ("lm_head.weight", "V H")),
)

# eh_proj's input columns are [enorm(embedding), hnorm(hidden)] on both sides.
MTP = (
    weight_row("enorm.weight", "H", ("pre_fc_norm_embedding.weight", "H")),
    weight_row("hnorm.weight", "H", ("pre_fc_norm_hidden.weight", "H")),
    weight_row("eh_proj.weight", "H H+H", ("fc.weight", "H H+H")),
    weight_row("final_layernorm.weight", "H", ("norm.weight", "H")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedRow:
    """One of transformers' fused expert tensors, which holds the released tensors of all experts.

    Attributes:
        name: Hugging Face name without the place's prefix.
        shape: shape letters, expert axis first.
        parts: released projections of one expert, in their order along the second axis.
        part_shape: shape letters of each part.
    """

    name: str
    shape: str
    parts: tuple[str, ...]
    part_shape: str


FUSED_EXPERTS = (
    FusedRow(
        name="mlp.experts.gate_up_proj",
        shape="E F+F H",
        parts=("gate_proj", "up_proj"),
        part_shape="F H",
    ),
    FusedRow(name="mlp.experts.down_proj", shape="E H F", parts=("down_proj",), part_shape="H F"),
)


# Modules whose ``_extra_state`` object Megatron's load requires, though it is empty outside FP8.
# These are the linears of either backend, and with Transformer Engine the norms too. {expert}: one
# object per expert.
ATTENTION_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
LAYER_STATES = (
    *ATTENTION_STATES,
    "pre_mlp_layernorm",
    "mlp.experts.experts.linear_fc1{expert}",
    "mlp.experts.experts.linear_fc2{expert}",
)
DENSE_STATES = (*ATTENTION_STATES, "mlp.linear_fc1", "mlp.linear_fc2")
SHARED_EXPERT_STATES = (
    *LAYER_STATES,
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)
HEAD_STATES = ("decoder.final_layernorm",)
MTP_STATES = ("enorm", "hnorm", "eh_proj", "final_layernorm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A part of the model and the rows of its weights.

    Attributes:
        rows: rows in the order of the model.
        states: modules with an ``_extra_state``, without the prefix; default none.
        megatron: prefix of the rows' Megatron keys, default empty.
        huggingface: prefix of the rows' Hugging Face names, default empty.
        layer_axis: True if the Megatron tensors have a leading layer axis, default False.
        mtp: True for a part of the MTP head, which a model may lack; default False.
    """

    rows: tuple[Row, ...]
    states: tuple[str, ...] = ()
    megatron: str = ""
    huggingface: str = ""
    layer_axis: bool = False
    mtp: bool = False


# Megatron keeps MTP depths apart instead of stacking them on an axis; the released model has one.
_MTP = "mtp.layers.0."

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
        rows=LAYER,
        states=LAYER_STATES,
        megatron=f"{_MTP}transformer_layer.",
        huggingface="mtp.layers.0.",
        mtp=True,
    ),
    Place(rows=MTP, states=MTP_STATES, megatron=_MTP, huggingface="mtp.", mtp=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One Hugging Face tensor of an entry.

    Attributes:
        name: released name.
        shape: sizes of its axes.
    """

    name: str
    shape: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One slice of one Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        key: Megatron key.
        global_shape: shape of the whole Megatron tensor, leading layer and expert axes included.
        index: position on the leading axes: (), (layer,), (expert,) or (layer, expert).
        shape: shape of the slice at ``index``.
        sources: Hugging Face tensors in the transform's order.
        transform: relation of the slice to the sources.
        padded_vocabulary: True if the Megatron tensor may have padding rows after the slice's.
        group: number of the part of the model, in order: embedding, each layer, final norm and
            head, MTP layer, other MTP weights. An import writes one file per group.
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
        """Size of the slice on each axis of the whole tensor.

        It is 1 on the leading axes, then ``shape``.
        """
        return (1,) * len(self.index) + self.shape

    @property
    def label(self) -> str:
        """Key and index: ``decoder.layers.mlp.router.weight[3]``."""
        return f"{self.key}[{','.join(map(str, self.index))}]" if self.index else self.key


def derive(architecture: Mellum2Architecture) -> list[Entry]:
    """Expand the table for ``architecture``.

    Returns:
        Entries in the order of the model: embedding, layers, final norm and head, MTP. Together
        they cover every Megatron tensor exactly and name every Hugging Face tensor once.

    Raises:
        ValueError: the table itself names a Hugging Face tensor or a Megatron slice twice, which
            is a programming error.
    """
    sizes = _sizes(architecture)
    entries = []
    for group, (layer, place) in enumerate(_places(architecture)):
        for row in place.rows:
            shape = _shape(row.shape, sizes)
            for expert in range(architecture.num_experts if row.per_expert else 1):
                axes = _leading_axes(architecture, place, layer, expert if row.per_expert else None)
                sources = tuple(
                    Source(
                        name=(place.huggingface + name).format(layer=layer, expert=expert),
                        shape=_shape(letters, sizes),
                    )
                    for name, letters in row.huggingface
                )
                entries.append(
                    Entry(
                        key=place.megatron + row.megatron,
                        global_shape=tuple(axis.size for axis in axes) + shape,
                        index=tuple(axis.index for axis in axes),
                        shape=shape,
                        sources=sources,
                        transform=row.transform,
                        padded_vocabulary=row.padded_vocabulary,
                        group=group,
                    )
                )
    # A row added twice would convert a weight twice, and the later write would win in silence.
    _check_once([(entry.key, entry.index) for entry in entries], "Megatron slice")
    _check_once(
        [source.name for entry in entries for source in entry.sources], "Hugging Face tensor"
    )
    return entries


def megatron_shapes(entries: list[Entry]) -> dict[str, Shape]:
    """Return the shape of every Megatron tensor by key."""
    return {entry.key: entry.global_shape for entry in entries}


def huggingface_shapes(entries: list[Entry]) -> dict[str, Shape]:
    """Return the shape of every released Hugging Face tensor by name."""
    return {source.name: source.shape for entry in entries for source in entry.sources}


def extra_states(architecture: Mellum2Architecture) -> list[str]:
    """Return the key of every ``_extra_state`` object, in the form of ``ShardedObject.unique_key``.

    ``decoder.layers.self_attention.linear_qkv._extra_state/shard_3_28``: layer 3 of 28;
    ``shard_3.17_28.64`` for its expert 17 of 64; ``shard_0_1`` where there is one
    (``megatron/core/transformer/utils.py:218-233``, 0.19.2).
    """
    keys = []
    for layer, place in _places(architecture):
        for module in place.states:
            per_expert = "{expert}" in module
            prefix = f"{place.megatron}{module.format(expert='')}._extra_state/shard"
            for expert in range(architecture.num_experts if per_expert else 1):
                axes = _leading_axes(architecture, place, layer, expert if per_expert else None)
                # Megatron numbers a lone object too: the first of one.
                axes = axes or [Axis(index=0, size=1)]
                indices = ".".join(str(axis.index) for axis in axes)
                sizes = ".".join(str(axis.size) for axis in axes)
                keys.append(f"{prefix}_{indices}_{sizes}")
    return keys


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedSlice:
    """Slice ``fused[expert, rows]`` of transformers' fused tensor that is a released expert tensor.

    Attributes:
        name: name of the fused tensor.
        expert: position on the fused tensor's first axis.
        rows: positions on the fused tensor's second axis.
    """

    name: str
    expert: int
    rows: slice


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedTensor:
    """One fused expert tensor.

    Attributes:
        name: Hugging Face name.
        shape: sizes of its axes, expert axis first.
        slices: slice of each released tensor in it, by released name.
    """

    name: str
    shape: Shape
    slices: dict[str, FusedSlice]


def fused_experts(architecture: Mellum2Architecture) -> dict[str, FusedTensor]:
    """Return, by name, the fused tensors ``[E, ...]`` that may replace released expert tensors."""
    sizes = _sizes(architecture)
    fused = {}
    for layer, place in _places(architecture):
        if not any(row.per_expert for row in place.rows):
            continue
        prefix = place.huggingface.format(layer=layer)
        for row in FUSED_EXPERTS:
            name, height = prefix + row.name, _shape(row.part_shape, sizes)[0]
            slices = {}
            for expert in range(architecture.num_experts):
                for number, part in enumerate(row.parts):
                    released = f"{prefix}mlp.experts.{expert}.{part}.weight"
                    rows = slice(number * height, (number + 1) * height)
                    slices[released] = FusedSlice(name=name, expert=expert, rows=rows)
            fused[name] = FusedTensor(name=name, shape=_shape(row.shape, sizes), slices=slices)
    return fused


def _places(architecture: Mellum2Architecture) -> Iterator[tuple[int, Place]]:
    """Yield every layer and place of the model in order; the layer is 0 without a layer axis."""
    layers = architecture.num_hidden_layers
    for place in PLACES:
        for depth in range(architecture.num_mtp_layers if place.mtp else 1):
            for layer in range(layers if place.layer_axis else 1):
                variant = _variant(architecture, place, layer) if place.rows is LAYER else place
                yield layer, _at_depth(variant, depth) if depth else variant


def _at_depth(place: Place, depth: int) -> Place:
    """Return the place of a further MTP layer, under names that no release has."""
    return replace(
        place,
        megatron=place.megatron.replace(_MTP, f"mtp.layers.{depth}."),
        huggingface=f"mtp.layers.{depth}." if place.rows is not MTP else f"mtp.{depth}.",
    )


def _variant(architecture: Mellum2Architecture, place: Place, layer: int) -> Place:
    """Return the place of one transformer layer, itself in a released model."""
    mlp = architecture.mtp_mlp_type if place.mtp else architecture.mlp_type(layer)
    if mlp == "dense":
        place = replace(place, rows=DENSE_LAYER, states=DENSE_STATES)
    elif architecture.shared_expert_intermediate_size is not None:
        place = replace(place, rows=SHARED_EXPERT_LAYER, states=SHARED_EXPERT_STATES)
    if architecture.latent_attention is not None and place.rows[0] is ATTENTION[0]:
        place = _with_latent_attention(architecture, place)
    # Layers of two kinds have no common tensor, so each has keys of its own
    # (megatron/core/transformer/transformer_block.py:736-785, 0.19.2).
    if place.layer_axis and len(set(architecture.mlp_layer_types)) > 1:
        place = replace(place, megatron=f"{place.megatron}{layer}.", layer_axis=False)
    return place


def _with_latent_attention(architecture: Mellum2Architecture, place: Place) -> Place:
    """Return the place of a layer whose attention is latent."""
    latent = architecture.latent_attention
    assert latent is not None
    rows = (*(QUERIES if latent.q_lora_rank is None else LATENT_QUERIES), *LATENT_ATTENTION)
    # Both backends have an ``_extra_state`` for each module but the norm that neither fuses.
    modules = (row.megatron.removesuffix(".weight") for row in rows)
    return replace(
        place,
        rows=(*rows, *place.rows[len(ATTENTION) :]),
        states=(*modules, *place.states[len(ATTENTION_STATES) :]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A leading axis of a Megatron tensor, and a slice's position on it.

    Attributes:
        index: position of the slice.
        size: size of the axis.
    """

    index: int
    size: int


def _leading_axes(
    architecture: Mellum2Architecture, place: Place, layer: int, expert: int | None
) -> list[Axis]:
    """Return the leading axes of a tensor or object in ``place``; None: no expert axis."""
    axes = []
    if place.layer_axis:
        axes.append(Axis(index=layer, size=architecture.num_hidden_layers))
    if expert is not None:
        axes.append(Axis(index=expert, size=architecture.num_experts))
    return axes


def _sizes(architecture: Mellum2Architecture) -> dict[str, int]:
    """Return the size behind each shape letter."""
    return {
        "V": architecture.vocab_size,
        "H": architecture.hidden_size,
        "D": architecture.head_dim,
        "Q": architecture.num_attention_heads * architecture.head_dim,
        "K": architecture.num_key_value_heads * architecture.head_dim,
        "E": architecture.num_experts,
        "F": architecture.moe_intermediate_size,
        "W": architecture.intermediate_size,
        "S": architecture.shared_expert_intermediate_size or 0,
        **latent_sizes(architecture),
    }


def _shape(letters: str, sizes: dict[str, int]) -> Shape:
    """Return the shape that ``letters`` spell: ``"Q+K+K H"`` -> (Q + 2K, H)."""
    return tuple(sum(sizes[letter] for letter in axis.split("+")) for axis in letters.split())


def _check_once(names: Iterable[object], what: str) -> None:
    """Raise ValueError if a name appears twice."""
    seen: set[object] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} appears twice in the mapping table")
        seen.add(name)
