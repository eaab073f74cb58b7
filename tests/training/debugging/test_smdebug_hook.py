"""smdebug's files hold what happened, and its hook changes nothing."""

import copy
import json
import logging
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from training.debugging.__main__ import main
from training.debugging.configuration import create_rules
from training.debugging.observations import read
from training.debugging.observer import Observer
from training.debugging.rules_metrics import StalledTrainingRule
from training.debugging.smdebug_files import read_trial
from training.debugging.smdebug_hook import SmdebugHook, import_smdebug
from training.debugging.verdicts import judge
from training.errors import ConfigError

needs_smdebug = pytest.mark.skipif(import_smdebug() is None, reason="smdebug is not installed")


def trial_of(folder: Path) -> Any:
    from smdebug.trials import create_trial

    return create_trial(str(folder))


@needs_smdebug
def test_tensors_and_scalars_can_be_read_back_at_our_steps(train: Any, tail: Any) -> None:
    from smdebug.core.modes import ModeKeys

    network, data = tail()
    run = train(network, data, [SmdebugHook(save_interval=4), Observer(4)], epochs=2, batch_size=4)
    trial = trial_of(run.folder / "tensors")
    for name in (
        "CrossEntropyLoss_output_0", "scalar/batch_loss", "scalar/batch_accuracy", "Tail_layer4.0.conv1.weight",
        "gradient/Tail_layer4.2.bn2.bias", "layer4.0.relu_output_0", "layer4.0.relu_output_1",
        "fc.activation_output_0",
    ):  # fmt: skip
        assert trial.tensor(name).steps(mode=ModeKeys.TRAIN) == [1, 4, 8, 12], name
    loss = trial.tensor("CrossEntropyLoss_output_0")
    assert [float(loss.value(step, mode=ModeKeys.TRAIN)) for step in (1, 4, 8, 12)] == pytest.approx(
        [run.losses[0], *run.losses[3::4]]
    )
    assert trial.tensor("scalar/epoch_loss").steps(mode=ModeKeys.EVAL) == [1, 2]
    assert trial.tensor("scalar/epoch_loss").value(2, mode=ModeKeys.EVAL).item() == pytest.approx(
        sum(run.losses[6:]) / 6
    )
    assert not [name for name in trial.tensor_names() if "layer3" in name]  # frozen
    ours = {(o.step, o.name): o.stats for o in read(run.folder / "observations.jsonl")}
    theirs = {(o.step, o.name): o.stats for o in read_trial(run.folder / "tensors")}
    same = [key for key in theirs if key in ours and key[1].startswith(("Tail", "gradient", "layer4", "fc"))]
    assert len(same) > 90
    for key in same:
        assert theirs[key]["l2"] == pytest.approx(ours[key]["l2"], rel=1e-5), key


@needs_smdebug
def test_training_is_bitwise_the_same_and_the_network_is_left_as_it_was(train: Any, small: Any, points: Any) -> None:
    copies: list[Any] = []
    networks = small(), small()
    plain = train(networks[0], points(100), [], folder="plain")
    hooked = train(
        networks[1], points(100), [SmdebugHook(save_interval=1)], folder="hooked",
        after_step=lambda number: copies.append((copy.deepcopy(networks[1]), pickle.dumps(networks[1]))),
    )  # fmt: skip
    assert plain.losses == hooked.losses
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in networks[1].modules())
    assert not any(hasattr(module, "_module_name") for module in networks[1].modules())
    assert not any(parameter._backward_hooks for parameter in networks[1].parameters())
    inputs = points(100).inputs
    expected = networks[1].eval()(inputs)
    last, pickled = copies[-1][0], pickle.loads(copies[-1][1])
    assert torch.equal(last.eval()(inputs), expected) and torch.equal(pickled.eval()(inputs), expected)


@needs_smdebug
def test_a_run_shorter_than_the_interval_is_saved_at_its_first_step_and_each_epoch(
    train: Any, small: Any, points: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from smdebug.core.modes import ModeKeys

    run = train(small(), points(100), [SmdebugHook()], epochs=2)
    for name in ("Small_hidden.weight", "gradient/Small_hidden.weight", "scalar/batch_loss"):
        assert trial_of(run.folder / "tensors").tensor(name).steps(mode=ModeKeys.TRAIN) == [1, 5, 10], name
    assert not [record.message for record in caplog.records if record.levelno > logging.INFO]
    config = tmp_path / "debughookconfig.json"  # with SageMaker's default interval of 500
    config.write_text(json.dumps({"LocalPath": str(tmp_path / "out"), "CollectionConfigurations": [
        {"CollectionName": "weights"}, {"CollectionName": "gradients"},
    ]}))  # fmt: skip
    train(small(), points(100), [SmdebugHook(config_path=config)], epochs=2, folder="job")
    assert trial_of(tmp_path / "out").tensor("Small_hidden.weight").steps(mode=ModeKeys.TRAIN) == [1]
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == [
        "smdebug: of the run's 10 steps tensors of the first are saved only; give a smaller save_interval"
    ]


@needs_smdebug
def test_the_folder_given_has_the_tensors_also_where_sagemaker_names_another(
    train: Any, small: Any, points: Any, tmp_path: Path
) -> None:
    config = tmp_path / "debughookconfig.json"
    config.write_text(json.dumps({"LocalPath": str(tmp_path / "not here"), "HookParameters": {"save_interval": "2"}}))
    for hook_config in (None, config):
        given = tmp_path / f"given-{hook_config is None}"
        train(small(), points(100), [SmdebugHook(hook_config, given, 2)], epochs=1, folder=given.name)
        assert "scalar/batch_loss" in trial_of(given).tensor_names()
    assert not (tmp_path / "not here").exists()


@needs_smdebug
def test_a_second_run_writes_beside_the_first_and_a_resumed_one_counts_on(train: Any, small: Any, points: Any) -> None:
    from smdebug.core.modes import ModeKeys

    train(small(), points(100), [SmdebugHook(save_interval=2)], epochs=1)
    run = train(small(), points(100), [SmdebugHook(save_interval=2)], epochs=2, first_step=6)
    steps = trial_of(run.folder / "tensors-2").tensor("scalar/batch_loss").steps(mode=ModeKeys.TRAIN)
    assert steps == [6, 8, 10]


@needs_smdebug
def test_sagemakers_configuration_decides(train: Any, small: Any, points: Any, tmp_path: Path) -> None:
    config = tmp_path / "debughookconfig.json"
    entry = {
        "S3OutputPath": "s3://bucket/prefix",
        "LocalPath": str(tmp_path / "out"),
        "HookParameters": {"save_interval": "5"},
        "CollectionConfigurations": [
            {"CollectionName": "gradients", "CollectionParameters": {"save_interval": "2"}},
            {"CollectionName": "mine", "CollectionParameters": {"include_regex": "relu_output", "save_interval": "5"}},
        ],
    }
    config.write_text(json.dumps(entry))
    train(small(), points(100), [SmdebugHook(config_path=config)], epochs=2)
    trial = trial_of(tmp_path / "out")
    assert trial.tensor("gradient/Small_hidden.weight").steps() != []
    assert "relu_output_0" in trial.tensor_names() and "Small_hidden.weight" not in trial.tensor_names()
    config.write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read as Debugger's configuration"):
        train(small(), points(100), [SmdebugHook(config_path=config)])


@needs_smdebug
def test_rules_judge_smdebugs_files_too(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(200), [SmdebugHook(save_interval=1)], learning_rate=0.0)
    rules = judge(create_rules(), read_trial(run.folder / "tensors"))
    found = {verdict.rule.name for verdict in rules.verdicts if verdict.count}
    assert {"UnchangedTensor", "WeightUpdateRatio", "LossNotDecreasing"} <= found
    assert not found & {"ExplodingTensor", "VanishingGradient", "DeadRelu", "AllZero", "StalledTrainingRule"}
    judged = {verdict.rule.name: verdict.rule.judged for verdict in rules.verdicts}
    assert judged["StalledTrainingRule"] and not judged["ClassImbalance"]  # the files have times, and no labels
    assert main([str(run.folder / "tensors")]) == 3


@needs_smdebug
def test_a_gap_in_the_times_of_smdebugs_files_is_found(train: Any, small: Any, points: Any) -> None:
    began_s = time.time()
    run = train(
        small(), points(100), [SmdebugHook(save_interval=1)], epochs=2,
        after_step=lambda number: time.sleep(1.5) if number == 3 else None,
    )  # fmt: skip
    seen = [*read_trial(run.folder / "tensors")]
    assert began_s < min(each.time_s for each in seen) <= max(each.time_s for each in seen) < time.time()
    rule = StalledTrainingRule(threshold=1)
    gaps = {firing.step: firing.value for each in seen for firing in rule.observe(each)}
    assert gaps[4] is not None and gaps[4] > 1.5


def test_without_smdebug_training_goes_on(
    train: Any, small: Any, points: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "smdebug.pytorch", None)  # what an import of a missing module meets
    with caplog.at_level(logging.INFO):
        run = train(small(), points(100), [SmdebugHook()], epochs=1)
    assert len(run.losses) == 5 and "smdebug is not installed" in caplog.text
