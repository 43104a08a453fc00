"""A run as a value: YAML out and in, sources, derived values, and an import without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import yaml

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import (
    Checkpoint,
    Data,
    Execution,
    Layout,
    Logging,
    Loss,
    Objective,
    Optimizer,
    Precision,
    Rl,
    Run,
    Schedule,
    Stability,
    Stream,
    from_yaml,
    keys,
    to_yaml,
)

ODD_OPTIMIZER = Optimizer(
    name="adam",
    lr=1e-5,
    min_lr=1e-7,
    weight_decay=0.0,
    clip_grad=0.5,
    muon_momentum=0.5,
    muon_nesterov=False,
    muon_ns_steps=7,
    muon_scale_mode="unit_rms_norm",
    muon_extra_scale=1.0,
    muon_tp_mode="duplicated",
    muon_split_qkv=False,
    muon_split_gate_up=True,
    muon_router=False,
    muon_mtp_projection=False,
    muon_dense_shards="even",
    adam_beta1=0.5,
    adam_beta2=0.25,
    adam_eps=1e-20,
    overlap_grad_reduce=False,
    overlap_param_gather=False,
)
ODD_CHECKPOINT = Checkpoint(
    output="/o",
    save_interval=5,
    retain_interval=10,
    load="/l",
    continue_from="/c",
    keep_last=2,
    verify="size",
    async_save=True,
    any_layout=False,
    gather_on_one_rank=True,
    parallel_load=False,
    reuse_plans=False,
)
ODD_RL = Rl(
    objective=Objective(
        group_size=4,
        prompts=5,
        oversampling=2.0,
        clip_low=0.1,
        clip_high=0.3,
        band_low=0.25,
        band_high=4.0,
        max_age=3,
        max_tokens=500,
        overlong_tokens=100,
        overlong_penalty=0.5,
        concision_penalty=0.25,
        concision_free_tokens=50,
    ),
    engine="vllm",
    server_python="p/python",
    hand_over="restart",
    engine_dtype="bfloat16",
    ahead=3,
    rounds=2,
    freeze_router=False,
    mtp_detach=False,
    chat_template="mellum",
    eval_answers=2,
    workers=3,
)


def odd_run() -> Run:
    """A run in which no field has its default, so that a field lost on the way shows."""
    return Run(
        name="odd: one",
        description="# not a comment, 'quotes' and a line-break",
        architecture=Mellum2Architecture.preset("mellum2-12b-128k").replace(
            num_hidden_layers=6,
            norm_topk_prob=False,
            eos_token_id=(28, 30),
            pad_token_id=3,
            num_mtp_layers=0,
        ),
        layout=Layout(
            tp=2,
            sp=True,
            pp=2,
            vpp=3,
            ep=4,
            etp=2,
            cp=2,
            dp=8,
            dispatcher="flex",
            dispatcher_backend="deepep",
            dispatcher_sms=24,
            overlap_expert_comm=True,
            delay_wgrad=True,
        ),
        execution=Execution(
            recompute=("layernorm", "moe_act"),
            offload=("core_attn", "expert_fc1"),
            gc_interval=7,
            fused_residual_norm=True,
            pad_expert_tokens=True,
            deterministic=True,
            extra_arguments=("--x", "null"),
        ),
        optimizer=ODD_OPTIMIZER,
        loss=Loss(
            aux_loss_coef=0.0,
            aux_loss_type="aux_loss",
            aux_loss_gradient="exact",
            bias_update_rate=0.002,
            capacity_factor=1.25,
            z_loss_coef=3e-7,
            mtp_factor=0.3,
            per_token=True,
            head_chunk=None,
        ),
        schedule=Schedule(
            style="cosine",
            train_samples=96,
            horizon_samples=128,
            warmup_samples=16,
            batch_schedule=((0, 16), (32, 32)),
            micro_batch_size=2,
        ),
        precision=Precision(
            compute="fp8",
            fp8_format="e4m3",
            fp8_recipe="blockwise",
            fp8_param_gather=True,
            bf16_first_layers=1,
            bf16_last_layers=2,
            bf16_mtp_projection=True,
            grad_reduce_in_fp32=False,
        ),
        stability=Stability(
            not_finite="skip", spike="ignore", spike_factor=2.0, spike_window=7, max_skips=1
        ),
        data=Data(
            path="null",
            sequence_length=64,
            tokenizer="3e-4",
            train=((0.1, "a b"), (2.0, "true")),
            valid=((1.0, "v"),),
            seed=7,
            workers=0,
            cache="~",
            document_attention=False,
            phase=3,
            first_sample=32,
            feed="redis",
            stream=Stream(
                user="reader",
                password_file="p",
                streamer_user="writer",
                streamer_password_file="q",
                ca_file="ca.pem",
                certificate="c.pem",
                key="k.pem",
                window=64,
                timeout_s=7.5,
            ),
        ),
        rl=ODD_RL,
        logging=Logging(
            log_interval=3,
            eval_interval=4,
            eval_iterations=3,
            eval_batch_size=8,
            validation_documents=True,
            tensorboard=False,
            wandb_project="12",
            wandb_entity="e",
            wandb_name="n",
            sample_prompts=("def f(", "null", "[a, b]: # é", "for x:\n\tpass\n"),
            sample_interval=2,
            sample_tokens=5,
            eval_tasks=("fim", "arithmetic"),
            eval_task_interval=3,
        ),
        checkpoint=ODD_CHECKPOINT,
        seed=99,
        seed_weights="by_name",
        backend="te",
        sources={"optimizer": "report §3", "schedule.batch_schedule": "a: b # c"},
    )


def test_odd_run_leaves_no_default() -> None:
    run = odd_run()
    own = (
        run.layout,
        run.optimizer,
        run.loss,
        run.precision,
        run.stability,
        run.data,
        run.rl,
        run.rl.objective,
        run.logging,
        run.checkpoint,
    )
    for section in own:
        for field in dataclasses.fields(section):
            # rl.server_python leaves no place for an address; the 12B recipes have one.
            if (section, field.name) != (run.rl, "url"):
                assert getattr(section, field.name) != field.default, field.name


def test_yaml_round_trip_is_exact() -> None:
    run = odd_run()
    text = to_yaml(run)
    assert from_yaml(text) == run
    assert to_yaml(from_yaml(text)) == text


def test_yaml_can_be_read_by_a_person_and_by_others() -> None:
    values = yaml.safe_load(to_yaml(odd_run()))
    assert list(values)[:4] == ["name", "description", "architecture", "layout"]
    assert values["schedule"]["batch_schedule"] == [[0, 16], [32, 32]]
    assert values["architecture"]["rope_full_attention"]["factor"] == 16.0
    assert "\n  lr: 1.0e-05\n" in to_yaml(odd_run())


def edited(**paths: Any) -> str:
    """Return the odd run's YAML with values put at ``a__b``, or removed with ``...``."""
    values = yaml.safe_load(to_yaml(odd_run()))
    for path, value in paths.items():
        *sections, name = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return yaml.safe_dump(values)


def test_a_file_older_than_a_key_takes_its_default_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = from_yaml(edited(optimizer__lr=..., loss=...))
    assert (run.optimizer.lr, run.loss) == (Optimizer().lr, Loss())
    assert run == dataclasses.replace(
        odd_run(),
        optimizer=dataclasses.replace(odd_run().optimizer, lr=Optimizer().lr),
        loss=Loss(),
    )
    assert {"before optimizer.lr existed" in caplog.text, "before loss existed" in caplog.text} == {
        True
    }


@pytest.mark.parametrize(
    ("text", "named", "helps"),
    [
        (edited(layout__dispacher=2), "layout.dispacher", "layout.dispatcher"),
        (edited(layot={}), "layot", "layout"),
        (edited(optimizer__lr="fast"), "optimizer.lr=fast", "a number"),
        (edited(layout__ep=2.0), "layout.ep=2.0", "a whole number"),
        (edited(layout__ep=True), "layout.ep=true", "a whole number"),
        (edited(optimizer__muon_nesterov="yes"), "optimizer.muon_nesterov='yes'", "true or false"),
        (edited(optimizer__muon_nesterov=1), "optimizer.muon_nesterov=1", "true or false"),
        (edited(backend="tee"), "backend=tee", "'te'"),
        (
            edited(schedule__batch_schedule=[[0, 16, 3]]),
            "schedule.batch_schedule",
            "2 values are needed",
        ),
        (edited(schedule__batch_schedule=16), "schedule.batch_schedule=16", "list of"),
        (edited(data__path=None), "data.path=null", "text"),
        (edited(layout=None), "layout", "mapping"),
        (edited(data__path=...), "data.path is missing", "add data.path"),
        (
            edited(architecture__rope_full_attention__fator=2),
            "architecture.rope_full_attention.fator",
            "factor",
        ),
        (edited(sources={"optimizer.rl": "x"}), "source of optimizer.rl", "optimizer.lr"),
        (edited(sources=["x"]), "sources", "{}"),
        (edited(optimizer__min_lr=1.0), "optimizer.min_lr=1.0", "0 to 1e-05"),
        ("[1, 2", "run file", "a file that `mellum2 train` wrote"),
        ("- 1", "run file", "mapping"),
    ],
)
def test_a_wrong_file_is_refused_by_key(text: str, named: str, helps: str) -> None:
    with pytest.raises(InputError) as error:
        from_yaml(text)
    assert named in error.value.value
    assert helps in error.value.rule + error.value.fix


def test_a_file_reads_words_as_the_command_line_does() -> None:
    """YAML 1.1 reads 3e-4 as text, 010 as 8, on as true."""
    text = to_yaml(odd_run())
    assert from_yaml(text.replace("  lr: 1.0e-05", "  lr: 3e-4")).optimizer.lr == 3e-4
    for old, new in (("ep: 4", "ep: 010"), ("sp: true", "sp: on"), ("seed: 99", "seed: 1:39")):
        assert old in text
        with pytest.raises(InputError):
            from_yaml(text.replace(old, new))


@pytest.mark.parametrize("word", ["none", "None", "NULL", "~", "true", "12", "3e-4", "a: b", " a"])
def test_text_that_looks_like_something_else_stays_text(word: str) -> None:
    run = dataclasses.replace(odd_run(), data=dataclasses.replace(odd_run().data, cache=word))
    assert from_yaml(to_yaml(run)) == run


def test_source_of_a_key_or_its_section() -> None:
    run = odd_run()
    assert run.source("optimizer.lr") == "report §3"
    assert run.source("schedule.batch_schedule") == "a: b # c"
    assert run.source("schedule.train_samples") is None
    assert run.source("seed") is None


def test_keys_are_all_leaves() -> None:
    known = keys()
    assert "layout.ep" in known
    assert "architecture.rope_full_attention.factor" in known
    assert "seed" in known
    assert not {"layout", "architecture", "sources"} & set(known)


def test_derived_values() -> None:
    run = odd_run()
    assert run.learning_rate(16) == 1e-5
    assert run.learning_rate(128) == 1e-7
    assert run.train_tokens == 96 * 64
    assert run.eval_batch_size == 8
    assert dataclasses.replace(run, logging=Logging()).eval_batch_size == 32
    auto = dataclasses.replace(run, backend="auto")
    assert (
        auto.resolved_backend("cuda"),
        auto.resolved_backend("cpu"),
        run.resolved_backend("cpu"),
    ) == (
        "te",
        "torch",
        "te",
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Optimizer(lr=0.0), "optimizer.lr=0.0"),
        (lambda: Optimizer(min_lr=1.0), "optimizer.min_lr=1.0"),
        (lambda: Optimizer(adam_beta2=1.0), "optimizer.adam_beta2=1.0"),
        (lambda: Optimizer(clip_grad=-1.0), "optimizer.clip_grad=-1.0"),
        (lambda: Optimizer(muon_ns_steps=0), "optimizer.muon_ns_steps=0"),
        (lambda: Optimizer(overlap_grad_reduce=False), "optimizer.overlap_param_gather=true"),
        (lambda: Loss(mtp_factor=-0.1), "loss.mtp_factor=-0.1"),
        (
            lambda: Optimizer(muon_split_gate_up=True, muon_split_qkv=False),
            "optimizer.muon_split_gate_up=true",
        ),
        (lambda: Precision(fp8_param_gather=True), "precision.fp8_param_gather=true"),
        (lambda: Precision(bf16_mtp_projection=True), "precision.bf16_mtp_projection=true"),
        (
            lambda: Precision(bf16_first_layers=1),
            "precision.bf16_first_layers=1 with precision.compute=bf16",
        ),
        (lambda: Precision(compute="fp8", bf16_last_layers=-1), "precision.bf16_last_layers=-1"),
        (
            lambda: Precision(compute="fp8", fp8_recipe="delayed", bf16_last_layers=1),
            "precision.fp8_recipe=delayed",
        ),
        (lambda: Data(path="x", sequence_length=8, first_sample=-1), "data.first_sample=-1"),
        (lambda: Data(path="x", sequence_length=0), "data.sequence_length=0"),
        (lambda: Stream(window=0), "data.stream.window=0"),
        (lambda: Stream(timeout_s=0.0), "data.stream.timeout_s=0"),
        (lambda: Stream(key="k"), "data.stream.key"),
        (lambda: Stream(key="k", certificate="c"), "data.stream.certificate=c"),
        (
            lambda: Stream(url="rediss://h:1", key="k", certificate="c", ca_file="a"),
            "data.stream.url=rediss://h:1 with data.stream.certificate",
        ),
        (lambda: Data(path="x", sequence_length=8, train=((0.0, "a"),)), "data.train"),
        (lambda: Logging(eval_interval=0), "logging.eval_interval=0"),
        (lambda: Logging(wandb_name="x"), "logging.wandb_name=x"),
        (lambda: Logging(sample_prompts=("a", "\n")), "logging.sample_prompts="),
        (lambda: Logging(sample_prompts=("\ud83d",)), "logging.sample_prompts"),
        (lambda: Logging(sample_interval=0), "logging.sample_interval=0"),
        (lambda: Logging(eval_task_interval=0), "logging.eval_task_interval=0"),
        (lambda: Logging(eval_tasks=("fin",)), "logging.eval_tasks: fin"),
        (lambda: Logging(eval_tasks=("fim", "fim")), "logging.eval_tasks: fim"),
        (lambda: Checkpoint(save_interval=3, retain_interval=10), "checkpoint.retain_interval=10"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, named: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert named in error.value.value


def test_nan_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer\.lr"):
        Optimizer(lr=float("nan"))


def test_planning_a_run_imports_neither_torch_nor_megatron() -> None:
    program = (
        "import sys\n"
        "from mellum2_megatron import config, recipes\n"
        "from mellum2_megatron.planning import optimizer_report, rules\n"
        "from mellum2_megatron.upstream import arguments\n"
        "phase1 = recipes.recipe('mellum2_12b_pretrain_phase1')\n"
        "run = config.apply_overrides(phase1, ['layout.ep=4'])\n"
        "rules.check(run, 256, 'cuda', machine=False)\n"
        "optimizer_report.optimizer_report(run, world_size=256, backend='te')\n"
        "arguments.megatron_arguments(run, world_size=256, device='cuda')\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
