"""What ``autobatch probe`` can be pointed at: names, options, and the workloads that come of them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from autobatch.cli.targets import FunctionTarget, ModelOptions, parse_target
from autobatch.cli.targets.common import OPTIMIZERS, make_optimizer
from autobatch.errors import InvalidArgumentError

NOTHING = ModelOptions()


def build(text: str, device: str = "meta", **options: object):
    return parse_target(text, ModelOptions(**options))(device)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a script of that many lines and gives its path; what it adds to the import path is taken back."""
    monkeypatch.setattr("sys.path", list(sys.path))

    def write(body: str, name: str = "train_it") -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(body))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return path

    return write


WORKLOAD = """
    import torch
    from autobatch.probe.workload import Workload

    def build(device="cpu", width=4):
        model = torch.nn.Linear(width, 2, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sample = lambda n: (torch.rand(n, width), torch.zeros(n, dtype=torch.long))
        return Workload(model, optimizer, torch.nn.functional.cross_entropy, sample)
"""


class TestNames:
    @pytest.mark.parametrize("text", ["gpt2", "hf:", ":build", "", ":"])
    def test_what_is_no_target_is_refused_with_all_that_are(self, text):
        with pytest.raises(InvalidArgumentError, match=r"hf:NAME, torchvision:NAME, timm:NAME, FILE.py:FUNCTION"):
            parse_target(text, NOTHING)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match=r"there is no .*/missing\.py"):
            parse_target(f"{tmp_path}/missing.py:build", NOTHING)

    def test_a_missing_module_is_named(self):
        with pytest.raises(InvalidArgumentError, match="there is no 'no_such_module'"):
            parse_target("no_such_module:build", NOTHING)

    def test_a_missing_function_lists_the_nearest_without_running_the_file(self, script):
        path = script("raise SystemExit('it ran')\ndef build_model(): ...\ntry:\n    other = 1\nfinally:\n    pass")
        with pytest.raises(InvalidArgumentError, match="build_model"):
            parse_target(f"{path}:biuld_model", NOTHING)
        assert isinstance(parse_target(f"{path}:other", NOTHING), FunctionTarget)
        with pytest.raises(InvalidArgumentError, match="none that looks like it; there are build_model, other"):
            parse_target(f"{path}:zzz", NOTHING)

    @pytest.mark.parametrize(
        ("text", "near"),
        [
            ("hf:gtp2", "gpt2"),
            ("torchvision:resnt50", "resnet50"),
            ("timm:vit_base_patch16_225", "vit_base_patch16_224"),
        ],
    )
    def test_an_unknown_model_lists_the_nearest(self, text, near):
        with pytest.raises(InvalidArgumentError, match=rf"{near}\b"):
            parse_target(text, NOTHING).import_modules()

    def test_detection_models_are_refused_rather_than_trained_wrongly(self):
        with pytest.raises(InvalidArgumentError, match="classification or segmentation"):
            build("torchvision:fasterrcnn_resnet50_fpn")

    @pytest.mark.parametrize(
        ("text", "option"),
        [
            ("timm:resnet18", {"seq_len": 8}),
            ("torchvision:resnet18", {"task": "causal-lm"}),
            ("hf:vit", {"seq_len": 8}),
            ("hf:gpt2", {"image_size": 8}),
        ],
    )
    def test_an_option_that_means_nothing_to_the_target_is_refused(self, text, option):
        with pytest.raises(InvalidArgumentError) as caught:
            parse_target(text, ModelOptions(**option)).import_modules()
        assert caught.value.argument in option

    @pytest.mark.parametrize("text", ["hf:gpt2", "torchvision:resnet18", "timm:resnet18", "json:dumps"])
    def test_targets_pickle(self, text):
        target = parse_target(text, ModelOptions(precision="bf16"))
        assert pickle.loads(pickle.dumps(target)) == target


class TestFunctions:
    def test_it_is_given_the_device(self, script):
        workload = build(f"{script(WORKLOAD)}:build", device="meta")
        assert workload.device.type == "meta"

    def test_options_go_to_parameters_of_their_name(self, script):
        path = script("def build(device, seq_len, optimizer=None): raise RuntimeError(f'{seq_len} {optimizer}')")
        with pytest.raises(RuntimeError, match="128 sgd"):
            build(f"{path}:build", seq_len=128, optimizer="sgd")

    def test_an_option_it_cannot_take_is_refused(self, script):
        with pytest.raises(InvalidArgumentError, match=r"parameter 'seq_len' of build\(\)"):
            build(f"{script(WORKLOAD)}:build", seq_len=128)

    def test_precision_and_mode_are_set_from_outside(self, script):
        workload = build(f"{script(WORKLOAD)}:build", device="cpu", precision="fp16", mode="both")
        assert (workload.precision, workload.mode) == ("fp16", "both")
        assert isinstance(workload.scaler, torch.amp.GradScaler)

    @pytest.mark.parametrize("parameters", ["device", "effective_batch_size=None", "**options"])
    def test_with_an_effective_batch_the_gradients_of_a_first_micro_batch_are_held(self, script, parameters):
        path = script(WORKLOAD + f"\n    def wrapped({parameters}):\n        return build('cpu')\n")
        assert build(f"{path}:wrapped", device="cpu", effective_batch_size=8).accumulate
        assert not build(f"{path}:wrapped", device="cpu").accumulate

    def test_a_step_function_is_told_the_effective_batch_or_it_is_refused(self, script):
        step = "from autobatch import Workload\ndef build({}): return Workload.from_step(lambda n: None)"
        with pytest.raises(InvalidArgumentError, match=r"parameter 'effective_batch_size' of build\(\)"):
            build(f"{script(step.format(''), 'untold')}:build", effective_batch_size=8)
        build(f"{script(step.format('effective_batch_size'), 'told')}:build", effective_batch_size=8)

    def test_an_evaluation_accumulates_nothing(self, script):
        path = script(WORKLOAD.replace("cross_entropy, sample)", "cross_entropy, sample, mode='eval')"))
        with pytest.raises(InvalidArgumentError, match="an evaluation accumulates nothing"):
            build(f"{path}:build", device="cpu", effective_batch_size=8)

    def test_checkpointing_a_model_without_it_is_refused(self, script):
        with pytest.raises(InvalidArgumentError, match="Linear has no checkpointing"):
            build(f"{script(WORKLOAD)}:build", grad_checkpointing=True)

    def test_what_is_no_workload_is_refused(self, script):
        with pytest.raises(InvalidArgumentError, match="it returned int"):
            build(f"{script('def build(): return 3')}:build")

    def test_the_files_folder_is_on_the_import_path_as_when_it_is_run(self, script):
        script("WIDTH = 7", name="beside_it")
        path = script("import beside_it\ndef build(): raise RuntimeError(f'width {beside_it.WIDTH}')")
        with pytest.raises(RuntimeError, match="width 7"):
            build(f"{path}:build")

    def test_a_file_with_the_name_of_an_installed_module_is_found_all_the_same(self, script):
        path = script("def build(): raise RuntimeError('mine')", name="json_like")
        renamed = path.rename(path.with_name("torch.py"))
        with pytest.raises(RuntimeError, match="mine"):
            build(f"{renamed}:build")
        assert sys.modules["torch"] is torch

    @pytest.mark.parametrize("name", ["train_it", "train-it", "torch"])
    def test_the_file_is_run_once_whatever_it_is_called(self, script, name):
        body = "import pathlib\nwith pathlib.Path(__file__ + '.runs').open('a') as runs:\n    runs.write('x')\n"
        path = script(body + WORKLOAD.replace("\n    ", "\n"), name="written")
        path = path.rename(path.with_name(f"{name}.py"))
        target = parse_target(f"{path}:build", NOTHING)
        target.import_modules()
        target("meta")
        assert Path(f"{path}.runs").read_text() == "x"

    def test_a_file_that_is_no_name_is_the_same_module_in_every_process(self, script):
        path = script("def build(): raise RuntimeError(__name__)", name="train-it")
        with pytest.raises(RuntimeError) as caught:
            build(f"{path}:build")
        code = f"from autobatch.cli.targets.function import _import; print(_import({str(path)!r}, '').__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(caught.value)

    @pytest.mark.parametrize("parameters", ["width", "device, width", "*, width"])
    def test_a_parameter_that_nothing_gives_is_named(self, script, parameters):
        with pytest.raises(InvalidArgumentError, match="no more than `device` and options; it needs 'width'"):
            build(f"{script(f'def build({parameters}): return 3')}:build")

    def test_its_own_error_is_not_touched(self, script):
        with pytest.raises(ZeroDivisionError):
            build(f"{script('def build(): return 1 / 0')}:build")


class TestTransformers:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("gpt2", "gpt2, causal-lm, 1024 tokens"),
            ("bert", "bert, masked-lm, 512 tokens"),
            ("vit", "vit, image-classification, images 3x224x224"),
            ("t5", "t5, seq2seq-lm, 1024 tokens"),
            ("roberta", "roberta, masked-lm, 510 tokens"),  # two positions go to its padding index
        ],
    )
    def test_the_usual_task_and_shape(self, name, expected):
        assert build(f"hf:{name}").name == expected

    def test_the_model_is_made_on_the_device_in_fp32_with_no_cache(self):
        model = build("hf:gpt2").model
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert sum(p.numel() for p in model.parameters()) == 124_439_808
        assert model.config.use_cache is False

    def test_batches_are_what_a_loader_gives(self):
        batch = build("hf:bert", seq_len=16).sample(3)
        assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
            "input_ids": ((3, 16), torch.long),
            "labels": ((3, 16), torch.long),
            "attention_mask": ((3, 16), torch.long),
        }

    def test_masked_batches_hold_some_padding_so_that_the_mask_is_used(self, tiny_bert):
        batch = build(f"hf:{tiny_bert}", device="cpu", seq_len=8).sample(2)
        assert batch["attention_mask"].sum() == 15

    @pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "qwen3"])
    def test_training_a_causal_model_reads_no_value(self, name):
        # On the meta device reading a value is an error; on a virtual GPU it would be a zero, and the wrong branch.
        build(f"hf:{name}", seq_len=32).train_step(2)

    def test_attention_without_a_mask_computes_what_transformers_does(self, tiny_gpt2):
        from transformers import AutoConfig, AutoModelForCausalLM

        model = build(f"hf:{tiny_gpt2}", device="cpu", seq_len=16).model.eval()
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_gpt2)).eval()
        plain.load_state_dict(model.state_dict())
        ids = torch.randint(50, (2, 16))
        assert model.config._attn_implementation != plain.config._attn_implementation
        assert torch.equal(model(ids).logits, plain(ids).logits)

    def test_a_sequence_beyond_the_positions_is_refused_with_the_limit(self):
        with pytest.raises(InvalidArgumentError, match="at most 1024") as caught:
            build("hf:gpt2", seq_len=2048)
        assert caught.value.argument == "seq_len"

    def test_a_task_it_does_not_know_is_refused_with_those_it_does(self):
        with pytest.raises(InvalidArgumentError, match="masked-lm, causal-lm"):
            build("hf:bert", task="image-classification")

    def test_a_file_that_is_no_configuration_is_refused(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
        with pytest.raises(InvalidArgumentError, match="a transformers configuration"):
            build(f"hf:{tmp_path}/config.json")

    @pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering"])
    @pytest.mark.parametrize("architecture", ["tiny_bert", "tiny_gpt2"])
    def test_other_tasks_train(self, task, architecture, request):
        path = request.getfixturevalue(architecture)
        build(f"hf:{path}", device="cpu", seq_len=8, task=task).train_step(2)

    def test_checkpointing_recomputes(self, tiny_gpt2):
        model = build(f"hf:{tiny_gpt2}", device="cpu", seq_len=8, grad_checkpointing=True).model
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def test_gradients_are_clipped_as_its_trainer_does(self):
        assert build("hf:vit").max_grad_norm == 1.0


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    GPT2Config(
        n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=50, bos_token_id=0, eos_token_id=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("tiny-bert")
    BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50
    ).save_pretrained(folder)
    return folder / "config.json"


class TestImages:
    @pytest.mark.parametrize("text", ["torchvision:resnet18", "timm:resnet18"])
    def test_with_an_effective_batch_it_holds_the_gradients_of_a_first_micro_batch(self, text):
        assert build(text, effective_batch_size=8).accumulate
        assert not build(text).accumulate

    @pytest.mark.parametrize(
        ("text", "options", "shape"),
        [
            ("torchvision:resnet50", {}, (2, 3, 224, 224)),
            ("torchvision:vit_b_16", {"image_size": 384}, (2, 3, 384, 384)),
            ("torchvision:inception_v3", {}, (2, 3, 299, 299)),
            ("torchvision:fcn_resnet50", {"image_size": 64}, (2, 3, 64, 64)),
            ("timm:vit_small_patch16_224", {"image_size": 96, "grad_checkpointing": True}, (2, 3, 96, 96)),
            ("timm:resnet18", {}, (2, 3, 224, 224)),
        ],
    )
    def test_a_training_step_of_the_right_shape(self, text, options, shape):
        workload = build(text, **options)
        images, _ = workload.sample(2)
        assert (tuple(images.shape), images.dtype) == (shape, torch.float32)
        assert {p.device.type for p in workload.model.parameters()} == {"meta"}
        workload.train_step(2)

    @pytest.mark.parametrize("text", ["torchvision:resnet18", "timm:vgg11"])
    def test_checkpointing_where_there_is_none_is_refused(self, text):
        with pytest.raises(InvalidArgumentError, match="no checkpointing") as caught:
            build(text, grad_checkpointing=True)
        assert caught.value.argument == "grad_checkpointing"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(name):
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(name, model)
    assert type(optimizer).__name__.lower() == name.removesuffix("-fused")
    assert bool(optimizer.defaults["fused"]) is name.endswith("-fused")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
