"""Every field of a run refuses values that no library behind it can take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.values import field_types
from mellum2_megatron.config import Run, apply_overrides, keys
from mellum2_megatron.recipes import recipe

ROPE = "architecture.rope_full_attention."
RUN = apply_overrides(
    recipe("mellum2_tiny_pretrain"),
    [
        f"{ROPE}rope_type=yarn",
        f"{ROPE}factor=2",
        f"{ROPE}original_max_position_embeddings=256",
        "logging.wandb_project=p",
        "precision.compute=fp8",
    ],
)
"""A run in which no field is refused because of another one."""

NUMBERS = ["nan", "inf", "-inf", "-1", "1e400", "1e300", "9" * 30, "9" * 5000]
TEXTS = ["", "a\nb", "a\0b", "a\x7fb", "a\u2028b", "\udcff"]
BLENDS = ["[[nan,a]]", "[[-1,a]]", "[[0,a]]", "[[1e300,a]]", "[[1,'']]", "[[1,'a\nb']]", "[[1,-a]]"]


def kinds(annotation: Any) -> set[Any]:
    """Types that a field may hold, lists by their items."""
    if annotation in (int, float, str):
        return {annotation}
    return {kind for part in get_args(annotation) if isinstance(part, type) for kind in [part]}


def annotation_of(key: str) -> Any:
    annotation: Any = Run
    for name in key.split("."):
        annotation = field_types(annotation)[name]
    return annotation


def bad_values() -> Iterator[tuple[str, str]]:
    for key in keys():
        annotation = annotation_of(key)
        if key in ("data.train", "data.valid"):
            yield from ((key, text) for text in BLENDS)
        elif key == "architecture.latent_attention":
            others = "qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8"
            yield from ((key, f"{{kv_lora_rank: {n}, {others}}}") for n in (*NUMBERS, "0"))
        elif key == "logging.sample_prompts":  # may have several lines
            yield from ((key, f"[x,'{text}']") for text in (" ", "a\u2028b"))
        elif key == "logging.eval_tasks":
            yield from ((key, f"[fim,{text}]") for text in ("fin", "fim"))
        elif key == "execution.extra_arguments":
            yield from ((key, f"[--x,'{text}']") for text in ("a\nb", "a\u2028b"))
        elif key == "schedule.batch_schedule":
            yield from ((key, f"[[0,{number}]]") for number in (*NUMBERS, "0"))
        elif kinds(annotation) & {int, float}:
            yield from ((key, number) for number in NUMBERS)
        elif str in kinds(annotation):
            yield from ((key, text) for text in TEXTS)


def named(key: str, value: str) -> str:
    return f"{key}-{ascii(value)[:12]}".replace(" ", "")


CASES = list(bad_values())


@pytest.mark.parametrize(("key", "value"), CASES, ids=[named(*case) for case in CASES])
def test_a_value_out_of_range_is_refused_by_its_key(key: str, value: str) -> None:
    with pytest.raises(InputError) as error:
        apply_overrides(RUN, [f"{key}={value}"])
    message = str(error.value)
    assert key.rpartition(".")[2] in message
    assert "\n" not in message
    assert len(message) < 500
    message.encode()  # can be printed
    assert any(form in message for form in forms(value)), message


def forms(value: str) -> list[str]:
    """Ways in which a message may show a value."""
    if not value:
        return ["must not be empty"]
    if value.startswith("{"):
        return forms(value.partition(": ")[2].partition(",")[0])
    item = value.strip("[]").partition(",")[2] if value.startswith("[") else value
    shown = [ascii(item)[1:-1][:20], item.strip("'"), value[2:].partition(",")[0]]
    try:
        return [*shown, str(float(item)), str(float(value[2:].partition(",")[0]))]
    except (ValueError, OverflowError):
        return [form for form in shown if form]


def test_no_kind_of_field_is_left_out() -> None:
    tested = {key for key, _ in CASES}
    choices = {
        key
        for key in keys()
        if annotation_of(key) in (bool, bool | None)
        or all(isinstance(choice, str) for choice in get_args(annotation_of(key)))
        or key.endswith(("layer_types", "execution.recompute", "execution.offload"))
    }
    assert tested | choices == set(keys())
    assert len(tested) > 60


@pytest.mark.parametrize("section", ["optimizer", "loss", "stability", "data", "logging", "layout"])
def test_a_dataclass_refuses_what_an_override_refuses(section: str) -> None:
    """Recipes are Python: there a wrong value meets no parser."""
    instance = getattr(RUN, section)
    for name, annotation in field_types(type(instance)).items():
        wrong: list[Any] = [object(), b"x"]
        if kinds(annotation) & {int, float}:
            wrong += [float("nan"), float("inf"), 10**400, -1, True]
        for value in wrong:
            with pytest.raises(InputError, match=name):
                dataclasses.replace(instance, **{name: value})


@pytest.mark.parametrize(
    ("override", "accepted"),
    [
        ("seed=2147483647", True),
        ("seed=2147483648", False),
        ("seed=0", False),
        ("data.seed=0", True),
        ("logging.wandb_project=team/mellum:v2", False),
        ("logging.wandb_project=" + "p" * 128, True),
        ("logging.wandb_project=" + "p" * 129, False),
        ("logging.wandb_entity=a/b", False),
        ("logging.wandb_name=a/b: 3%", True),
        ("logging.wandb_name=" + "n" * 129, False),
        ("name=a/b", False),
        ("name=..", False),
        ("data.path=-x", False),
        ("data.path=./-x", True),
        ("data.path=" + "x" * 256, False),
        ("checkpoint.load=" + "é" * 128, False),
        ("checkpoint.load=" + "é" * 127, True),
        ("timeout_minutes=1e-9", False),
        ("setup_timeout_minutes=0", False),
        ("optimizer.adam_eps=1e-46", False),
        ("optimizer.lr=11", False),
        ("schedule.horizon_samples=9223372036854775807", False),
        ("architecture.eos_token_id=[3,-1]", False),
        ("architecture.num_hidden_layers=1000000000000", False),
        ("architecture.num_experts=65536", False),
        (f"{ROPE}rope_theta=1", False),
        ("layout.dp=1073741823", True),
        ("layout.dp=1073741824", False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_last_value_inside_and_the_first_outside(override: str, accepted: bool) -> None:
    if accepted:
        apply_overrides(RUN, [override])
    else:
        with pytest.raises(InputError):
            apply_overrides(RUN, [override])


@pytest.mark.parametrize("letter", "/\\#?%:")
def test_project_names_are_wandbs_own(letter: str) -> None:
    wandb = pytest.importorskip("wandb")
    with pytest.raises(InputError, match=r"logging\.wandb_project"):
        apply_overrides(RUN, [f"logging.wandb_project=a{letter}b"])
    with pytest.raises(wandb.errors.UsageError):
        wandb.Settings(project=f"a{letter}b")
