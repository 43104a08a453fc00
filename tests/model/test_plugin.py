"""The layer spec alone: a stock Megatron-LM command line with `--spec` builds the same model."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.gpt import GPTModelBuilder

from mellum2_megatron.architecture import PRESETS, Mellum2Architecture, architecture_arguments
from mellum2_megatron.model import layer_specs
from mellum2_megatron.model.scoring import score_tokens
from tests import REPOSITORY
from tests.model.hf_reference import make_reference, to_megatron
from tests.model.own_specs import ARCHITECTURE
from tests.model.test_parity import relative_error, tokens_of

pytestmark = pytest.mark.usefixtures("megatron_world")

STOCK = (
    "--micro-batch-size 1 --seq-length 64 --max-position-embeddings 256 --train-iters 1 --lr 1e-3 "
    "--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion "
    "--no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --use-cpu-initialization --distributed-backend gloo "
    "--moe-token-dispatcher-type alltoall --moe-router-dtype fp32 --tokenizer-type NullTokenizer"
).split()


def stock_model(
    monkeypatch, architecture: Mellum2Architecture, words: list[str], spec: tuple[str, str]
):
    """Build a model with Megatron-LM's own parser, validation, import of the spec, and builder."""
    vocabulary = [
        "--vocab-size",
        str(architecture.vocab_size),
        "--padded-vocab-size",
        str(architecture.vocab_size),
    ]
    monkeypatch.setattr(
        "sys.argv", ["pretrain_gpt.py", *STOCK, *vocabulary, *words, "--spec", *spec]
    )
    args = parse_args()
    validate_args(args)
    config = gpt_config_from_args(args)
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def without(words: list[str], *flags: str) -> list[str]:
    """Drop flags, each with its value if it has one."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word in flags
        if not skipping:
            kept.append(word)
    return kept


@pytest.mark.parametrize(
    "window_given", [True, False], ids=["window_on_the_command_line", "window_from_the_spec"]
)
def test_stock_builder_computes_the_same_logits(monkeypatch, window_given):
    words = architecture_arguments(ARCHITECTURE)
    if not window_given:
        words = without(words, "--window-size", "--window-attn-skip-freq")
    model = stock_model(monkeypatch, ARCHITECTURE, words, ("tests.model.own_specs", "SPEC"))
    reference = make_reference(ARCHITECTURE)
    weights = to_megatron(
        ARCHITECTURE, {n: p.detach() for n, p in reference.named_parameters().items()}
    )
    model.load_state_dict(weights, strict=False)
    assert {name for name, _ in model.named_parameters()} == set(weights)
    tokens = tokens_of(ARCHITECTURE, 50)
    with torch.no_grad():
        logits, mtp_logits = reference.logits(tokens)
    ours, our_mtp = score_tokens(model, tokens)
    assert relative_error(ours, logits) < 1e-5
    assert relative_error(our_mtp[:, :-1], mtp_logits) < 1e-5


def test_qk_norm_comes_with_the_spec_where_there_is_no_mtp_layer(monkeypatch):
    words = without(architecture_arguments(ARCHITECTURE), "--qk-layernorm", "--mtp-num-layers")
    monkeypatch.setattr(
        "tests.model.own_specs.SPEC",
        layer_specs.layer_spec(ARCHITECTURE.replace(num_mtp_layers=0), "torch"),
    )
    model = stock_model(monkeypatch, ARCHITECTURE, words, ("tests.model.own_specs", "SPEC"))
    assert model.decoder.layers[0].self_attention.q_layernorm.weight.shape == (
        ARCHITECTURE.head_dim,
    )


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--qk-layernorm", None, "--qk-layernorm"),
        ("--window-size", "8,0", "--window-size 7,0"),
        ("--norm-epsilon", "1e-5", "--norm-epsilon 1e-06"),
        ("--moe-router-topk", "1", "--moe-router-topk 2"),
        ("--swiglu", None, "--swiglu"),
        ("--kv-channels", None, "--kv-channels 16"),
    ],
)
def test_command_line_of_another_model_is_refused(monkeypatch, flag, value, named):
    words = without(architecture_arguments(ARCHITECTURE), flag) + ([flag, value] if value else [])
    if flag == "--moe-router-topk":
        words.append("--moe-router-pre-softmax")  # which Megatron wants with top-1
    with pytest.raises(ValueError, match=named):
        stock_model(monkeypatch, ARCHITECTURE, words, ("tests.model.own_specs", "SPEC"))


def test_every_preset_has_a_spec_under_its_name():
    backends = ("torch", "te") if layer_specs.HAVE_TE else ("torch",)
    expected = {
        preset.replace("-", "_") + ("_torch" if backend == "torch" else ""): architecture
        for preset, architecture in PRESETS.items()
        for backend in backends
    }
    specs = {
        name: value for name, value in vars(layer_specs).items() if isinstance(value, ModuleSpec)
    }
    assert specs.keys() == expected.keys()
    for name, architecture in expected.items():
        assert specs[name].submodules.self_attention.params["architecture"] is architecture
    yarn = specs["mellum2_12b_128k_torch"].submodules.self_attention.params["architecture"]
    assert yarn.rope_full_attention.rope_type == "yarn"
    assert yarn.rope_sliding_attention.rope_type == "default"


@pytest.mark.slow
def test_examples_of_the_plugin_page_run():
    """The command that prints arguments, and the model alone, as docs/plugin.md has them."""
    page = (REPOSITORY / "docs/plugin.md").read_text()
    (printing,) = re.findall(r'^python -c "\n(.*?)"$', page, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (alone,) = [block for block in blocks if "score_tokens" in block]
    alone += "print(tuple(logits.shape), tuple(mtp_logits.shape))"
    words, shapes = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")[-2]
        for program in (printing, alone)
    ]
    assert words.split() == architecture_arguments(PRESETS["mellum2-12b-128k"])
    assert shapes == "(1, 4, 4096) (1, 4, 4096)"
