"""Overrides: typed by the field, strict about keys, validated together."""

from __future__ import annotations

from typing import Any

import pytest

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.recipes import recipe

TINY = "mellum2_tiny_pretrain"


def value(run: Run, key: str) -> Any:
    current: Any = run
    for name in key.split("."):
        current = getattr(current, name)
    return current


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("layout.ep=4", 4),
        ("layout.dp=8", 8),
        ("layout.dp=null", None),
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.lr=1", 1.0),
        ("optimizer.muon_nesterov=false", False),
        ("optimizer.muon_nesterov=True", True),
        ("optimizer.name=adam", "adam"),
        ("seed=4_096", 4096),
        ("architecture.bos_token_id=+1", 1),
        ("backend=torch", "torch"),
        ("name=my run = 3", "my run = 3"),
        ("data.path=/a/b=c", "/a/b=c"),
        ("data.path=12", "12"),
        ("data.tokenizer=null", None),
        ("data.tokenizer=folder", "folder"),
        ("data.train=[[0.7,a],[3e-1,b/c]]", ((0.7, "a"), (0.3, "b/c"))),
        ("data.train=[]", ()),
        ("schedule.batch_schedule=[[0,16],[320,32]]", ((0, 16), (320, 32))),
        ("schedule.batch_schedule=(0, 16), (320, 32)", ((0, 16), (320, 32))),
        ("schedule.batch_schedule=[[0,16]]", ((0, 16),)),
        ('data.train=[[1, "/web (1)/a,b"]]', ((1.0, "/web (1)/a,b"),)),
        ("data.train=[[1, /web (1)/[a]: b]]", ((1.0, "/web (1)/[a]: b"),)),
        ("optimizer.lr=.5", 0.5),
        ("data.path=2026-01-02", "2026-01-02"),
        ("architecture.eos_token_id=[3,5]", (3, 5)),
        ("architecture.eos_token_id=3", 3),
        ("architecture.eos_token_id=null", None),
        ("architecture.layer_types=full_attention," + 3 * "sliding_attention,", None),
        ("architecture.rope_sliding_attention.rope_theta=10_000", 10_000.0),
    ],
)
def test_values_are_typed_by_their_field(override: str, expected: Any) -> None:
    key = override.partition("=")[0]
    if expected is None and "layer_types" in key:
        override, expected = override.rstrip(","), ("full_attention",) + 3 * ("sliding_attention",)
    run = recipe(TINY)
    changed = apply_overrides(run, [override])
    assert value(changed, key) == expected
    assert type(value(changed, key)) is type(expected)
    assert changed.source(key) == f"override {override}"
    assert run == recipe(TINY), "the run given is left as it was"


@pytest.mark.parametrize(
    ("override", "rule", "fix"),
    [
        ("layot.ep=2", "there is no key 'layot.ep'", "'layout.ep'"),
        ("ep=2", "there is no key 'ep'", "'layout.ep'"),
        ("optimizer.rate=1", "there is no key", "(optimizer has name, lr, min_lr,"),
        ("optimizer.learning_rate=1", "there is no key", "'optimizer.lr'"),
        ("schedule.lr=1", "there is no key", "'optimizer.lr'"),
        ("layout=2", "there is no key 'layout'", "layout.tp"),
        ("layout.ep.x=2", "there is no key", "layout.ep"),
        ("sources=x", "there is no key 'sources'", ""),
        ("layout.ep", "KEY=VALUE", "layout.ep=8"),
        ("=3", "KEY=VALUE", "layout.ep=8"),
        ("layout.ep=two", "must be a whole number", "a whole number"),
        ("layout.ep=2.0", "must be a whole number", "a whole number"),
        ("layout.ep=1__0", "must be a whole number", "a whole number"),
        ("layout.ep=null", "must be a whole number", "a whole number"),
        ("optimizer.lr=fast", "must be a number", "a number"),
        ("optimizer.muon_nesterov=1", "must be true or false", "true or false"),
        ("optimizer.name=mouon", "must be 'muon' or 'adam'", "'muon'"),
        ("backend=transformer_engine", "must be 'auto' or 'te' or 'torch'", ""),
        ("schedule.batch_schedule=16", "must be list of", ""),
        ("schedule.batch_schedule=[[0,16]", "must be list of", ""),
        ("schedule.batch_schedule=[[0,16,1]]", "must be list of", "2 values are needed, 3 given"),
        ("data.train=[[1, /a,b/x]]", "must be list of", 'needs quotes: [1, "/a,b/x"]'),
        ("data.train=[['1', x]]", "must be list of [a number, text]", ""),
        ("seed=010", "must be a whole number", "without zeros in front"),
        ("optimizer.lr=010", "must be a number", "without zeros in front"),
        ("seed=1:30", "must be a whole number", "a whole number"),
        ("seed=0x10", "must be a whole number", "a whole number"),
        ("seed=\u0663", "must be a whole number", "a whole number"),
        ("seed=1e3", "must be a whole number", "1000"),
        ("seed=1e30", "must be a whole number", "give a whole number"),
        ("schedule.train_samples=9223372036854775807", "whole step", "use 9223372036854775792"),
        ("seed=" + "9" * 5000, "must be a whole number", "a whole number"),
        ("optimizer.lr=" + "9" * 5000, "must be a number", "a number"),
        ("optimizer.lr=1e400", "must be a number", "a finite number"),
        ("optimizer.lr=-inf", "must be a number", "a finite number"),
        ("optimizer.lr=nan", "must be a number", "a finite number"),
        ("optimizer.muon_nesterov=on", "must be true or false", "write true"),
        ("data.path=null", "must be text", "cannot be absent"),
        ("foo=1", "there is no key 'foo'", "closest: "),
        ("learning_rate=1", "there is no key", "'optimizer.lr'"),
        ("train_steps=40", "there is no key 'train_steps'", "set schedule.train_samples: lengths"),
        ("schedule.train_iterations=3", "there is no key", "lengths are in samples"),
        ("warmup_iters=3", "there is no key", "set schedule.warmup_samples"),
        ("architecture=mellum2-tyni", "no preset", "'mellum2-tiny'"),
        ("architecture.layer_types=[sliding]", "must be list of", "'sliding_attention'"),
        ("layout.tp=2", "sequence parallelism", "layout.sp=true"),
    ],
)
def test_bad_overrides_are_named(override: str, rule: str, fix: str) -> None:
    with pytest.raises(InputError) as error:
        apply_overrides(recipe(TINY), [override])
    assert rule in error.value.rule
    assert fix in error.value.fix
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


def test_of_a_key_given_twice_the_last_holds_and_a_line_names_both(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["optimizer.lr=1e-3", "layout.ep=1", "optimizer.lr = 2e-3", "layout.ep=1"]
    run = apply_overrides(recipe(TINY), words)
    assert (run.optimizer.lr, run.layout.ep) == (2e-3, 1)
    (line,) = caplog.messages
    assert line == (
        "optimizer.lr is given more than once: optimizer.lr=2e-3 holds, not optimizer.lr=1e-3"
    )


def test_values_given_together_are_validated_together() -> None:
    run = apply_overrides(
        recipe(TINY), ["layout.tp=2", "layout.sp=true", "optimizer.lr=1", "optimizer.lr=2"]
    )
    assert (run.layout.tp, run.layout.sp, run.optimizer.lr) == (2, True, 2.0)
    shorter = [
        "schedule.train_samples=160",
        "schedule.warmup_samples=16",
        "schedule.decay_samples=32",
    ]
    assert apply_overrides(recipe(TINY), shorter).schedule.train_samples == 160


def test_layers_continue_or_cut_their_pattern() -> None:
    sliding, full = "sliding_attention", "full_attention"
    period = (sliding, sliding, sliding, full)
    for layers in (1, 3, 4, 6, 8):
        run = apply_overrides(recipe(TINY), [f"architecture.num_hidden_layers={layers}"])
        assert run.architecture.layer_types == (2 * period)[:layers]
    given = apply_overrides(
        recipe(TINY),
        ["architecture.num_hidden_layers=2", f"architecture.layer_types=[{full},{sliding}]"],
    )
    assert given.architecture.layer_types == (full, sliding)
    assert (
        apply_overrides(
            recipe(TINY), ["architecture.num_mtp_layers=0"]
        ).architecture.mtp_layer_types
        == ()
    )


def test_a_preset_comes_before_changes_to_its_fields() -> None:
    overrides = [
        "architecture.num_hidden_layers=8",
        "architecture=mellum2-12b-128k",
        "architecture.num_experts=32",
    ]
    run = apply_overrides(recipe(TINY), overrides)
    expected = Mellum2Architecture.preset("mellum2-12b-128k").replace(
        num_hidden_layers=8, num_experts=32
    )
    assert run.architecture == expected
    assert run.source("architecture.num_experts") == "override architecture.num_experts=32"
    assert run.source("architecture.head_dim") == "override architecture=mellum2-12b-128k"


def test_a_nested_yarn_is_set_as_a_whole() -> None:
    prefix = "architecture.rope_full_attention."
    overrides = [
        f"{prefix}{change}"
        for change in ("rope_type=yarn", "factor=2", "original_max_position_embeddings=256")
    ]
    rope = apply_overrides(recipe(TINY), overrides).architecture.rope_full_attention
    assert (rope.rope_type, rope.factor, rope.rope_theta) == ("yarn", 2.0, 500_000.0)
    with pytest.raises(InputError, match="factor"):
        apply_overrides(recipe(TINY), overrides[:1])
