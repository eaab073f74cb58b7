"""What is observed is what happened, and observing changes nothing."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from training.callbacks import Callback, RunContext, Step
from training.debugging import statistics
from training.debugging.configuration import create_rules
from training.debugging.observations import Observation, read
from training.debugging.observer import Observer, observed_modules
from training.debugging.smdebug_files import read_trial
from training.debugging.smdebug_hook import SmdebugHook, import_smdebug
from training.debugging.tensorboard import TensorBoardLog
from training.errors import DataError
from training.run import fit, prepare


class Weights(Callback):
    """Keeps the weights and gradients of each step, to compare with."""

    def on_run_start(self, context: RunContext) -> None:
        self.network, self.before, self.gradients, self.after = context.network, {}, {}, {}

    def on_backward_end(self, step: Step) -> None:
        self.before[step.number] = copy.deepcopy(self.network.state_dict())
        self.gradients[step.number] = {n: p.grad.clone() for n, p in self.network.named_parameters()}

    def on_step_end(self, step: Step) -> None:
        self.after[step.number] = copy.deepcopy(self.network.state_dict())


def seen_in(run: Any) -> dict[tuple[int, str], Observation]:
    return {(seen.step, seen.name): seen for seen in read(run.folder / "observations.jsonl")}


def test_figures_are_those_of_the_tensors(train: Any, small: Any, points: Any) -> None:
    kept = Weights()
    run = train(small(), points(100), [Observer(2), kept], epochs=1)
    seen = seen_in(run)
    assert sorted({step for step, name in seen if name == "Small_classes.weight"}) == [1, 2, 4]
    before, after = kept.before[4]["hidden.weight"], kept.after[4]["hidden.weight"]
    weight = seen[4, "Small_hidden.weight"].stats
    assert weight["mean_abs"] == pytest.approx(float(before.abs().mean()))
    assert weight["std"] == pytest.approx(float(before.std(correction=0)))
    assert weight["update_ratio"] == pytest.approx(float((after - before).norm() / before.norm()))
    assert weight["since"] == 2
    earlier = kept.before[2]["hidden.weight"]
    assert weight["change_ratio"] == pytest.approx(float((before - earlier).norm() / earlier.norm()))
    gradient, bias = kept.gradients[4]["hidden.weight"], seen[1, "Small_bn.bias"].stats
    figures = seen[4, "gradient/Small_hidden.weight"].stats
    assert (figures["min"], figures["max"]) == pytest.approx((float(gradient.min()), float(gradient.max())))
    assert figures["p95"] == pytest.approx(float(gradient.quantile(0.95)), rel=0.05)
    assert bias["zeros"] == 1 and bias["nan"] == bias["inf"] == 0
    assert seen[4, "CrossEntropyLoss_output_0"].value == pytest.approx(run.losses[3])
    assert seen[4, "CrossEntropyLoss_output_0"].stats["mean"] == pytest.approx(sum(run.losses[2:4]) / 2)


def test_activations_are_seen_before_and_after_an_inplace_relu(train: Any, small: Any, points: Any) -> None:
    seen = seen_in(train(small(), points(100), [Observer(1)], epochs=1))
    assert seen[3, "relu_input_0"].stats["min"] < 0 == seen[3, "relu_output_0"].stats["min"]
    activity = seen[3, "relu_output_0"].series
    assert len(activity) == 101 and list(activity) == sorted(activity) and 0 <= activity[0] <= activity[-1] <= 100


def test_labels_of_every_step_and_the_figures_of_epochs_are_kept(train: Any, small: Any, points: Any) -> None:
    data = points(100)
    seen = seen_in(train(small(), data, [Observer(5)], epochs=2))
    labels = np.sum([np.reshape(each.series, (3, -1))[0] for (_, name), each in seen.items() if name == "labels"], 0)
    assert labels.tolist() == (2 * data.labels.bincount()).tolist()
    assert {name for step, name in seen if step == 10} >= {"scalar/epoch_loss", "scalar/epoch_accuracy"}


def test_training_is_bitwise_the_same_with_and_without(train: Any, small: Any, points: Any) -> None:
    networks = small(), small()
    plain = train(networks[0], points(100), [], folder="plain")
    observed = train(networks[1], points(100), [Observer(1, create_rules())], folder="observed")
    assert plain.losses == observed.losses
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in networks[1].modules())


def test_only_what_is_trained_and_run_is_observed(train: Any, tail: Any) -> None:
    network, data = tail()
    assert set(observed_modules(network)) == {"layer4.0.relu", "layer4.1.relu", "layer4.2.relu", "fc.activation"}
    names = {name for _, name in seen_in(train(network, data, [Observer(1)], epochs=1, batch_size=24))}
    assert {"Tail_layer4.0.conv1.weight", "gradient/Tail_fc.classes.bias", "layer4.2.relu_output_1"} <= names
    assert "fc.activation_output_0" in names
    assert not [name for name in names if "layer3" in name or "Tail_conv1" in name]


def test_blocks_that_are_unfrozen_later_are_watched_from_then_on(settings: Any, tmp_path: Path) -> None:
    config = tmp_path / "debughookconfig.json"
    mine = {"CollectionName": "mine", "CollectionParameters": {"include_regex": "gradient/.*bias"}}
    config.write_text(json.dumps({
        "LocalPath": str(tmp_path / "tensors"), "HookParameters": {"save_interval": "2"},
        "CollectionConfigurations": [{"CollectionName": "biases"}, mine],
    }))  # fmt: skip
    training = settings(side=16, epochs=2, unfreeze_at=2, batch_size=16)
    fitted = fit(training, prepare(training), [Observer(2, create_rules()), SmdebugHook(config), TensorBoardLog()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fitted.network.modules())
    assert not any(parameter._backward_hooks for parameter in fitted.network.parameters())
    seen = [*read(training.folder / "observations.jsonl")]
    for name in ("Network_layer1.0.conv1.weight", "gradient/Network_layer1.0.conv1.weight", "layer1.0.relu_output_0"):
        assert [each.step for each in seen if each.name == name] == [4], name  # of two epochs of two steps
    changed = [each.stats["update_ratio"] for each in seen if each.name == "Network_layer1.0.conv1.weight"]
    assert min(changed) > 0
    curves = EventAccumulator(str(training.folder / "tensorboard"), {"histograms": 0}).Reload()
    for name in ("weights/layer1.0.conv1.weight", "gradients/layer1.0.conv1.weight", "activations/layer1.0.relu"):
        assert {each.step for each in curves.Histograms(name)} == {4}, name
    if import_smdebug() is not None:
        saved = [each for each in read_trial(tmp_path / "tensors") if "layer1.0.bn1.bias" in each.name]
        assert {each.name for each in saved} == {f"{way}Network_layer1.0.bn1.bias" for way in ("", "gradient/")}
        assert {each.step for each in saved} == {4}


def test_a_resumed_run_goes_on_where_it_was(train: Any, small: Any, points: Any) -> None:
    rules: Callable[[], Observer] = lambda: Observer(1, create_rules(["UnchangedTensor"]))  # noqa: E731
    train(small(), points(400), [rules()], epochs=2, learning_rate=0.0)
    run = train(small(), points(400), [rules()], epochs=3, learning_rate=0.0, first_step=41)
    steps = [seen.step for seen in read(run.folder / "observations.jsonl") if seen.name == "Small_classes.weight"]
    assert steps == list(range(1, 61))
    assert run.verdicts["UnchangedTensor"]["firings"][0]["step"] == 22  # found in the first part


def test_a_cut_off_file_is_read_up_to_the_cut_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "observations.jsonl"
    whole = Observation(3, "relu_output_0", "activation_output", 1.5, {"max": float("inf")}, (0.5, 1.0))
    path.write_text(whole.line() + "\n" + whole.line()[:20])
    (again,) = read(path)
    assert again.series == whole.series and np.isnan(again.stats["max"])  # JSON has no infinity
    path.write_text(json.dumps({"kind": "step"}) + "\n")
    fields = {"step": 1, "name": "x", "kind": "loss", "time_s": 0, "stats": {"value": 1}}
    for damage in ({"step": float("inf")}, {"stats": {"value": 10**400}}, {"kind": "bogus"}, {"kind": ["x"]},
                   {"series": ["a"]}):  # fmt: skip
        path.write_text(json.dumps({**fields, **damage}) + "\n")
        with pytest.raises(DataError, match="line 1 is not an observation"):
            list(read(path))
    path.write_text(json.dumps({"kind": "step"}) + "\n")
    with pytest.raises(DataError, match="line 1 is not an observation"):
        list(read(path))


def test_changes_agree_with_numpy() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(0, 1, 50).astype(np.float32)
    before[0] = 0
    for scale in (0.0, 1e-9, 1e-6, 1e-4):
        after = before * np.float32(1 + scale)
        needed = float(statistics.changes(torch.tensor(after), torch.tensor(before), 1e-8)["needed_rtol"])
        assert (needed <= 1e-5) == np.allclose(after, before, rtol=1e-5, atol=1e-8)
    broken = torch.tensor([1.0, float("nan"), float("inf")])
    assert statistics.changes(broken, broken, 1e-8)["needed_rtol"] == 0
    assert statistics.changes(broken, torch.ones(3), 1e-8)["needed_rtol"] == float("inf")


def test_activity_counts_how_often_a_channel_is_above_zero() -> None:
    outputs = torch.zeros(10, 4, 2, 2)
    outputs[:5, 1] = 1
    outputs[:, 2:] = 1
    activity = statistics.activity(outputs)
    assert activity[0] == 0 and activity[33] == 50 and activity[100] == 100
    assert nn.ReLU()(outputs).equal(outputs)


def test_a_full_disk_costs_a_warning_and_the_rules_go_on(
    train: Any, small: Any, points: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "observations.jsonl").symlink_to("/dev/full")
    run = train(small(), points(200), [Observer(1, create_rules(["UnchangedTensor"]))], learning_rate=0.0)
    assert run.status("UnchangedTensor") == "IssuesFound"
    (warned,) = [each for each in caplog.messages if "observations.jsonl" in each]
    assert warned == "observations.jsonl cannot be written (No space left on device); the run goes on without it"
