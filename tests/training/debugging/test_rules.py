"""Each rule fires on a run with its disease and is silent on a healthy one."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from training.debugging.__main__ import main
from training.debugging.configuration import RULES, create_rules, read_rules
from training.debugging.observations import Observation, read, scalar
from training.debugging.observer import Observer
from training.debugging.rules_metrics import StalledTrainingRule
from training.debugging.verdicts import judge
from training.errors import ConfigError


def watched(rule: str, action: str | None = None, interval: int = 1, **parameters: object) -> Observer:
    return Observer(interval, create_rules([{"rule": rule, "parameters": parameters, "action": action}]))


def test_a_healthy_run_has_no_issues(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(400, spread=2.0), [Observer(5, create_rules())], epochs=3, learning_rate=0.005)
    assert {name: entry["firings"] for name, entry in run.verdicts.items() if entry["firings"]} == {}
    assert {entry["status"] for entry in run.verdicts.values()} == {"NoIssuesFound"}
    assert set(run.verdicts) == set(RULES)
    assert main([str(run.folder)]) == 0


def test_residual_branches_that_start_at_zero_are_not_ill(train: Any, points: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Unflatten(1, (6, 2, 2)), BasicBlock(6, 6), nn.Flatten(), nn.Linear(24, 4))
    nn.init.zeros_(network[1].bn2.weight)
    kept = Observer(1, create_rules(["VanishingGradient", "AllZero", "DeadRelu", "WeightUpdateRatio"]))
    run = train(network, points(200), [kept], epochs=3, learning_rate=0.01)
    first = next(o for o in read(run.folder / "observations.jsonl") if o.name == "gradient/Sequential_1.conv1.weight")
    assert first.stats["zeros"] == 1  # a rule that judged this step alone would fire
    assert {entry["status"] for entry in run.verdicts.values()} == {"NoIssuesFound"}


def test_vanishing_gradient_fires_behind_many_sigmoids(train: Any, points: Any) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(24, 24), nn.Sigmoid())]
    run = train(nn.Sequential(*layers, nn.Linear(24, 4)), points(200), [watched("VanishingGradient")])
    firing = run.verdicts["VanishingGradient"]["firings"][0]
    assert firing["tensor"].startswith("gradient/Sequential_") and firing["value"] < firing["threshold"] == 1e-7
    assert firing["step"] == 23  # the third observation in a row, once a run has settled


def test_exploding_tensor_fires_when_the_learning_rate_is_absurd(train: Any, points: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    run = train(network, points(200), [watched("ExplodingTensor", interval=50)], learning_rate=1e20)
    assert run.error is not None
    assert run.status("ExplodingTensor") == "IssuesFound"  # seen after the failure, between two observed steps


def test_poor_initialization_fires_when_one_layer_is_far_too_large(train: Any, points: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )  # fmt: skip
    with torch.no_grad():
        network[2].weight.mul_(1e-6)
        network[4].weight.mul_(1e-6)
        network[4].bias.zero_()  # the loss of every batch is that of a guess
    rule = watched("PoorWeightInitialization", activation_inputs_regex=".*_input")
    run = train(network, points(400), [rule], epochs=1, learning_rate=1e-7)
    firing = run.verdicts["PoorWeightInitialization"]["firings"][0]
    assert firing["value"] > firing["threshold"] == 10


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ((1.7, 1.2, 1.3, 1.4, 1.3, 1.35, 1.25, 1.3, 1.4, 1.3), 0),  # one lucky batch, then what noise there is
        ((1.61, 1.60, 1.61, 1.61, 1.60, 1.62, 1.61, 1.60, 1.61, 1.61), 1),
    ],
)
def test_one_lucky_batch_does_not_make_the_loss_look_stuck(losses: tuple[float, ...], count: int) -> None:
    seen = []
    for step, loss in enumerate(losses, 1):
        seen.append(Observation(step, "loss", "loss", 0.0, {"value": loss, "mean": loss}))
        seen.append(Observation(step, "gradient/a.weight", "gradient", 0.0, {"size": 9, "p5": -1e-5, "p95": 1e-5}))
    assert judge(create_rules(["PoorWeightInitialization"]), seen).verdicts[0].count == count


def test_dead_relu_fires_when_biases_are_far_below_zero(train: Any, small: Any, points: Any) -> None:
    network = small()
    with torch.no_grad():
        network.bn.bias.fill_(-100)
    run = train(network, points(100), [watched("DeadRelu")], epochs=1)
    assert run.verdicts["DeadRelu"]["firings"][0]["tensor"] == "relu_output_0"
    assert run.verdicts["DeadRelu"]["firings"][0]["value"] == 100


def test_all_zero_fires_when_weights_are_zero(train: Any, points: Any) -> None:
    network = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    run = train(network, points(100), [watched("AllZero")], epochs=5)
    assert "Sequential_0.weight" in {firing["tensor"] for firing in run.verdicts["AllZero"]["firings"]}


@pytest.mark.parametrize("rule", ["UnchangedTensor", "WeightUpdateRatio"])
def test_weights_that_do_not_move_are_found(train: Any, small: Any, points: Any, rule: str) -> None:
    run = train(small(), points(100), [watched(rule)], epochs=5, learning_rate=0.0)
    assert {firing["tensor"] for firing in run.verdicts[rule]["firings"]} >= {"Small_hidden.weight"}


@pytest.mark.parametrize("rule", ["UnchangedTensor", "WeightUpdateRatio"])
def test_weights_that_hardly_move_as_a_schedule_ends_are_none(train: Any, small: Any, points: Any, rule: str) -> None:
    """The rate is a ten-millionth of the configured one (0.0175), as at a schedule's end."""
    run = train(small(), points(100), [watched(rule)], epochs=5, learning_rate=1e-9)
    assert run.verdicts[rule]["count"] == 0


def test_updates_far_larger_than_the_weights_are_found(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(100), [watched("WeightUpdateRatio")], epochs=1, learning_rate=1e4)
    assert run.verdicts["WeightUpdateRatio"]["firings"][0]["threshold"] == 10


def test_loss_not_decreasing_fires_when_nothing_is_learned(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(200), [watched("LossNotDecreasing")], epochs=6, learning_rate=0.0)
    assert run.verdicts["LossNotDecreasing"]["firings"][0]["tensor"] == "CrossEntropyLoss_output_0"


@pytest.mark.parametrize(
    ("losses", "given", "count", "first"),
    [
        ([4, 3.02, 3.04, 2.9, 2.95, 2.8], {}, 0, ""),  # as chance would have it
        ([4, 3, 3.02, 2.999, 3.01], {}, 2, "fell by 0.0333 % only since step 20, its least, from 3 to 2.999"),
        ([4, 3, 3.02, 2.9], {"patience": 0}, 1, "rose by 0.667 % since step 20"),
        ([4, 3, 3.2, 2.9], {}, 1, "rose by 6.67 %"),
        ([4, 3, 3.2, 2.9], {"increase_threshold_percent": "7"}, 0, ""),
        ([0.0, 0.0, 0.0], {}, 0, ""),
    ],
)
def test_a_loss_may_rise_a_little_once(losses: list[float], given: dict[str, object], count: int, first: str) -> None:
    seen = [Observation(1, "run", "start", 0.0, {"interval": 10.0, "epoch": 10.0, "batch": 1.0})]
    for epoch, value in enumerate(losses, 1):
        seen += [Observation(10 * epoch, "CrossEntropyLoss_output_0", "loss", 0.0, {"value": value}),
                 scalar(10 * epoch, "scalar/epoch_loss", value, 0.0)]  # fmt: skip
    (verdict,) = judge(create_rules([{"rule": "LossNotDecreasing", "parameters": given}]), seen).verdicts
    assert verdict.count == count
    assert verdict.rule.judged == (len(losses) > 2)
    if count:
        assert first in verdict.firings[0].message


def test_overfit_and_overtraining_fire_when_few_points_are_memorised(train: Any, small: Any, points: Any) -> None:
    rules = [{"rule": "Overfit"}, {"rule": "Overtraining"}]
    run = train(small(), points(40, spread=4.0), [Observer(10, create_rules(rules))], epochs=25)
    assert run.status("Overfit") == "IssuesFound"
    assert run.verdicts["Overtraining"]["firings"][0]["tensor"].startswith("scalar/")


def test_class_imbalance_fires_when_one_class_has_most_images(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(800, shares=(95, 2, 2, 1)), [watched("ClassImbalance")], epochs=2)
    assert run.verdicts["ClassImbalance"]["firings"][0]["value"] > 10


def test_rare_classes_that_are_predicted_wrong_are_found(train: Any, small: Any, points: Any) -> None:
    data = points(800, shares=(8, 8, 8, 1), spread=4.0)
    rule = watched("ClassImbalance", threshold_imbalance=100)
    run = train(small(), data, [rule], epochs=3, learning_rate=0.01)
    assert any("predicted wrong" in firing["message"] for firing in run.verdicts["ClassImbalance"]["firings"])


def test_a_stalled_run_is_reported_by_the_watchdog_and_stopped(train: Any, small: Any, points: Any) -> None:
    rule = StalledTrainingRule(stop_training_on_fire=True)
    rules = create_rules(["StalledTrainingRule"])
    rule.threshold = 0.2  # type: ignore[assignment]  # AWS counts whole seconds
    rules.verdicts[0].rule = rule
    run = train(
        small(), points(200), [Observer(1, rules)],
        after_step=lambda number: time.sleep(0.6) if number == 3 else None,
    )  # fmt: skip
    assert run.status("StalledTrainingRule") == "IssuesFound"
    assert len(run.losses) == 3 and "nothing happened" in str(run.error)


def test_a_gap_in_the_times_is_found_afterwards() -> None:
    seen = [scalar(step, "scalar/batch_loss", 1.0, time_s) for step, time_s in ((1, 0.0), (2, 10.0), (3, 5000.0))]
    rules = judge(create_rules(["StalledTrainingRule"]), seen)
    assert [firing.step for firing in rules.verdicts[0].firings] == [3]
    resumed = [seen[0], seen[1], Observation(2, "run", "start", 5000.0), seen[2]]
    assert judge(create_rules(["StalledTrainingRule"]), resumed).verdicts[0].count == 0


def test_the_action_stop_ends_the_run(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(200), [watched("UnchangedTensor", "stop")], learning_rate=0.0)
    assert len(run.losses) == 21  # step 22 is not counted: it ended the run
    assert "UnchangedTensor" in str(run.error) and "observations ago" in str(run.error)
    assert run.status("UnchangedTensor") == "IssuesFound"


def test_verdicts_are_the_same_live_and_afterwards(train: Any, small: Any, points: Any, tmp_path: Path) -> None:
    run = train(small(), points(200), [Observer(1, create_rules())], learning_rate=0.0)
    afterwards = judge(create_rules(), read(run.folder / "observations.jsonl"))
    assert {v.rule.name: (v.status, v.count) for v in afterwards.verdicts} == {
        name: (entry["status"], entry["count"]) for name, entry in run.verdicts.items()
    }
    assert main([str(run.folder)]) == 3
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\nrule = "DeadRelu"\n')
    assert main([str(run.folder), "--rules", str(rules)]) == 0
    assert main([str(tmp_path / "nothing")]) == 2


def test_parameters_are_taken_as_aws_passes_them() -> None:
    given = [
        {"rule": "WeightUpdateRatio", "parameters": {"num_steps": "5", "rule_to_invoke": "WeightUpdateRatio"}},
        {"rule": "ExplodingTensor", "parameters": {"only_nan": "True", "collection_names": ["losses", "weights"]}},
    ]
    ratio, exploding = (verdict.rule for verdict in create_rules(given).verdicts)
    assert ratio.parameters["num_steps"] == 5 and ratio.parameters["large_threshold"] == 10
    assert exploding.parameters == {"collection_names": "losses,weights", "tensor_regex": None, "only_nan": True}


# The parameters of the examples of https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-rules.html, and
# some that differ from ours once they are read.
EXAMPLES: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "DeadRelu": (
        {"tensor_regex": ".*relu_output|.*ReLU_output", "threshold_inactivity": "1.0", "threshold_layer": "50.0"},
        {"tensor_regex": ".*relu_output|.*ReLU_output"},
    ),
    "ExplodingTensor": ({"tensor_regex": ".*gradient", "only_nan": "False"}, {"tensor_regex": ".*gradient"}),
    "PoorWeightInitialization": (
        {
            "activation_inputs_regex": ".*relu_input|.*ReLU_input", "threshold": "10.0", "distribution_range": "0.001",
            "patience": "5", "steps": "10",
        },
        {"activation_inputs_regex": ".*relu_input|.*ReLU_input"},
    ),
    "VanishingGradient": ({"threshold": "0.0000001"}, {}),
    "WeightUpdateRatio": (
        {
            "num_steps": "100", "large_threshold": "10.0", "small_threshold": "0.00000001", "epsilon": "0.000000001",
        },
        {"num_steps": 100},
    ),
    "AllZero": ({"tensor_regex": ".*", "threshold": "100"}, {"tensor_regex": ".*"}),
    "ClassImbalance": (
        {
            "threshold_imbalance": "10", "threshold_misprediction": "0.7", "samples": "500", "argmax": "False",
            "labels_regex": ".*labels", "predictions_regex": ".*predictions",
        },
        {},
    ),
    "LossNotDecreasing": (
        {
            "tensor_regex": ".*", "use_losses_collection": "True", "num_steps": "10", "diff_percent": "0.1",
            "increase_threshold_percent": "5", "mode": "GLOBAL",
        },
        {"tensor_regex": ".*"},
    ),
    "Overfit": (
        {"tensor_regex": ".*", "start_step": "0", "patience": "1", "ratio_threshold": "0.1"}, {"tensor_regex": ".*"},
    ),
    "Overtraining": ({"patience_train": "5", "patience_validation": "10", "delta": "0.01"}, {}),
    "StalledTrainingRule": (
        {"threshold": "1800", "stop_training_on_fire": "True", "training_job_name_prefix": "my-job"},
        {"stop_training_on_fire": True, "training_job_name_prefix": "my-job"},
    ),
    "UnchangedTensor": (
        {
            "collection_names": "losses", "tensor_regex": "", "num_steps": "3", "rtol": "1e-05", "atol": "1e-08",
            "equal_nan": "False",
        },
        {"collection_names": "losses", "tensor_regex": ""},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_awss_own_examples_are_taken_and_their_values_are_our_defaults(name: str) -> None:
    given, changed = EXAMPLES[name]
    (verdict,) = create_rules([{"rule": name, "parameters": {"rule_to_invoke": name, **given}}]).verdicts
    assert verdict.rule.parameters == {**RULES[name]().parameters, **changed}


@pytest.mark.parametrize(
    ("regex", "status"), [(".*", 1), ("CrossEntropyLoss_output", 1), ("validation_loss", 1), ("accuracy", 0)]
)
def test_overfit_looks_at_the_losses_that_its_expression_takes(regex: str, status: int) -> None:
    seen = [Observation(1, "CrossEntropyLoss_output_0", "loss", 0.0, {"value": 1.0})]
    seen += [scalar(each, f"scalar/{name}", value, 0.0) for each in (2, 3, 4)
             for name, value in (("epoch_loss", 0.1), ("validation_loss", 1.0))]  # fmt: skip
    (verdict,) = judge(create_rules([{"rule": "Overfit", "parameters": {"tensor_regex": regex}}]), seen).verdicts
    assert (verdict.count > 0, verdict.rule.judged) == (bool(status), bool(status))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([{"rule": "Overfitting"}], "known are: VanishingGradient"),
        ([{"rule": "Overfit", "parameters": {"ratio": 1}}], "known are: tensor_regex, start_step, patience, ratio_"),
        ([{"rule": "Overfit", "parameters": {"patience": "many"}}], "is not of the type of the default 1"),
        ([{"rule": "Overfit", "action": "email"}], 'known are "none" and "stop"'),
        ([{"rule": "AllZero", "parameters": {"tensor_regex": "("}}], "not a regular expression"),
        ([{"rule": "AllZero", "parameters": {"collection_names": "weight"}}], "known are: weights"),
        ([{"name": "Overfit"}], "A rule is an object"),
        ({"rule": "Overfit"}, "Rules are a list"),
    ],
)
def test_a_wrong_configuration_is_refused_with_what_is_known(given: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        create_rules(given)


def test_each_of_the_twelve_rules_says_what_to_do() -> None:
    assert len(RULES) == 12
    assert [name for name, rule in RULES.items() if not rule.advice.endswith(".")] == []


def test_a_rule_that_cannot_judge_says_so(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(100), [Observer(1)], epochs=1)
    rules = create_rules([{"rule": "UnchangedTensor", "parameters": {"atol": 1e-3}}])
    verdict = judge(rules, read(run.folder / "observations.jsonl")).verdicts[0]
    assert verdict.status == "Error" and "atol" in str(verdict.error)


def test_a_run_too_short_for_a_rule_is_told_and_how_long_it_had_to_be(
    train: Any, small: Any, points: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = train(small(), points(100), [Observer(100, create_rules())], epochs=2)
    assert "; too little was seen to judge (rules.json says why): VanishingGradient, PoorWeight" in caplog.messages[-1]
    assert {entry["status"] for entry in run.verdicts.values()} == {"NoIssuesFound"}  # for machines
    told = {name: entry["unjudged"] for name, entry in run.verdicts.items() if not entry["judged"]}
    assert told["VanishingGradient"] == "judges from step 300 on, the run had 10"
    assert told["Overtraining"] == "judges from step 35 on, the run had 10"
    assert {name for name, entry in run.verdicts.items() if entry["judged"]} == {
        "ExplodingTensor", "DeadRelu", "WeightUpdateRatio", "Overfit", "StalledTrainingRule",
    }  # fmt: skip
    assert main([str(run.folder)]) == 0
    (line,) = [line for line in caplog.messages if line.startswith("VanishingGradient ")]
    assert line.split(maxsplit=1)[1] == "not judged     judges from step 300 on, the run had 10"


@pytest.mark.parametrize("interval", [1, 10, 40])
def test_the_step_from_which_a_rule_judges_is_the_one_it_names(
    train: Any, small: Any, points: Any, interval: int
) -> None:
    run = train(small(), points(100), [Observer(interval)], epochs=70)
    seen = [*read(run.folder / "observations.jsonl")]
    for name in RULES:
        (verdict,) = judge(create_rules([name]), seen).verdicts
        assert verdict.rule.judged and verdict.pace is not None
        first = verdict.rule.judges_from(verdict.pace)
        for step in (first - 1, first):
            (early,) = judge(create_rules([name]), [each for each in seen if each.step <= step]).verdicts
            assert early.rule.judged == (step == first), (name, first)


def test_a_rule_that_saw_nothing_of_what_it_looks_at_says_so(train: Any, small: Any, points: Any) -> None:
    run = train(small(), points(100), [watched("DeadRelu", tensor_regex="none such")], epochs=1)
    assert run.verdicts["DeadRelu"]["unjudged"] == "saw nothing to judge"


def test_rules_can_be_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([{"rule": "DeadRelu", "action": "stop"}]))
    assert [verdict.stop for verdict in read_rules(path).verdicts] == [True]
    path.write_text('[{"rule": []}]')
    with pytest.raises(ConfigError, match="There is no rule"):
        read_rules(path)
    path.write_text('[{"rule": "Overfit", "parameters": {"patience": "1e400"}}]')
    with pytest.raises(ConfigError, match="patience"):
        read_rules(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as a list of rules"):
        read_rules(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a list of rules"):
        read_rules(path)
