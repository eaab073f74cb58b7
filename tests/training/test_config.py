"""Settings: the defaults are the reference recipe, every field is a flag, what is wrong is named."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from training.config import TrainingConfig
from training.errors import ConfigError
from training.flags import parse_hyperparameters, unknown_name
from training.train_model import parse_arguments

PLACES = {"data": "in", "output": "out"}
EXAMPLES = {
    "data": "some/where", "validation": "held/out", "output": "else/where",
    "weights": "none", "freeze": "stem,layer1", "learning_rate": "0.5",
    "batch_size": "3", "epochs": "4", "optimizer": "adamw", "momentum": "0.1", "weight_decay": "0.2",
    "layer_decay": "0.7", "schedule": "one-cycle", "warmup_epochs": "1.5", "unfreeze_at": "3", "unfreeze_rate": "0.2",
    "augment": "none", "mixup": "0.3", "cutmix": "1.0", "label_smoothing": "0.1", "ema_decay": "0.99",
    "clip_norm": "2.0", "early_stopping": "2", "feature_cache": "off", "cache_folder": "ca/che", "cache_crops": "4",
    "side": "64", "hidden_units": "5", "precision": "auto", "compile": "true", "deterministic": "true", "seed": "6",
    "validation_fraction": "0.3", "broken_files": "skip", "run_folder": "the/run", "checkpoints": "check/points",
    "checkpoint_every_s": "7.5", "device": "cpu", "loader_workers": "2", "model_name": "tiny",
    "report": "false", "quantize": "off",
}  # fmt: skip


def create(**values: object) -> TrainingConfig:
    return TrainingConfig.create({**PLACES, **values})


def from_flags(*arguments: str) -> TrainingConfig:
    return TrainingConfig.create(parse_arguments(["--data", "in", "--output", "out", *arguments]))


def test_the_defaults_are_the_reference_recipe() -> None:
    config = create()
    assert config.learning_rate == 0.017483127170473314
    assert (config.batch_size, config.epochs, config.momentum, config.weight_decay) == (128, 70, 0.9, 0.0)
    assert (config.optimizer, config.schedule) == ("sgd", "constant")
    assert (config.side, config.weights, config.hidden_units) == (32, "imagenet", 512)
    assert config.frozen == ("stem", "layer1", "layer2", "layer3")
    assert config.precision == "fp32"
    assert (config.layer_decay, config.warmup_epochs, config.unfreeze_at) == (1.0, 0.0, None)
    assert (config.mixup, config.cutmix, config.label_smoothing, config.ema_decay) == (0.0, 0.0, 0.0, 0.0)
    assert (config.clip_norm, config.early_stopping) == (0.0, 0)


def test_settings_do_not_change_after_they_are_made() -> None:
    config = create()
    with pytest.raises(ValidationError):
        config.epochs = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", TrainingConfig.model_fields)
def test_every_field_is_a_flag_with_dashes_or_underscores(name: str) -> None:
    expected = {name: EXAMPLES[name]}
    for flag in (f"--{name.replace('_', '-')}", f"--{name}"):
        assert parse_arguments([flag, EXAMPLES[name]]) == expected
        assert parse_arguments([f"{flag}={EXAMPLES[name]}"]) == expected
    config = TrainingConfig.create({**PLACES, **expected})
    assert config.model_dump(mode="json")[name] != TrainingConfig.create(PLACES).model_dump(mode="json")[name]


def test_flags_become_values_of_the_fields_types() -> None:
    config = TrainingConfig.create(EXAMPLES)
    assert config.data == Path("some/where")
    assert (config.learning_rate, config.batch_size, config.loader_workers) == (0.5, 3, 2)
    assert config.freeze == ("stem", "layer1")


def test_flags_that_are_not_given_are_left_to_the_defaults() -> None:
    assert parse_arguments([]) == {}


def test_help_names_every_flag_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # lines are not broken at hyphens
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in TrainingConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert str(field.description).split(":")[0] in text
    assert "default: stem,layer1,layer2,layer3, but none with --weights none" in text
    assert "(default: 0.017483127170473314)" in text
    assert "--augment {none,flip,flip-crop,rand}" in text


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--lr=0.1"], "--lr"),
        (["--sagemaker"], "--sagemaker"),
        (["stray"], "stray"),
        (["--epochs", "1", "--unknown_thing", "2"], "--unknown_thing"),
    ],
)
def test_an_unknown_flag_is_refused_and_the_known_are_listed(arguments: list[str], given: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_arguments(arguments)
    what = "flag" if given.startswith("-") else "argument"
    assert str(refused.value).startswith(f"Unknown {what} {given}.")
    for name in TrainingConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in str(refused.value)


def test_of_a_flag_that_is_nearly_known_that_alone_is_said() -> None:
    """Abbreviations are not guessed."""
    with pytest.raises(ConfigError) as refused:
        parse_arguments(["--learning-rat", "1"])
    assert str(refused.value) == "Unknown flag --learning-rat. Did you mean --learning-rate?"


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("epochs", "zero", "--epochs zero: give a whole number (passes"),
        ("epochs", "1.5", "--epochs 1.5: give a whole number"),
        ("epochs", "0", "--epochs 0: must be at least 1"),
        ("learning_rate", "-1", "--learning-rate -1: must be above 0"),
        ("momentum", "1", "--momentum 1: must be below 1"),
        ("mixup", "11", "--mixup 11: must be at most 10"),
        ("compile", "perhaps", "--compile perhaps: give true or false"),
        ("optimizer", "adam", "--optimizer adam: give 'sgd' or 'adamw'"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_in_plain_words(name: str, given: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        create(**{name: given})
    assert str(refused.value).startswith(sentence)


def test_an_unknown_hyperparameter_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(ConfigError) as refused:
        create(learning_rates="1")
    assert str(refused.value) == "Unknown hyperparameter learning_rates. Did you mean learning_rate?"
    with pytest.raises(ConfigError) as refused:
        create(xyzzy="1")
    assert all(name in str(refused.value) for name in TrainingConfig.model_fields)


@pytest.mark.parametrize(
    ("given", "meant"), [("--batch-sise", "batch_size"), ("epoch", "epochs"), ("--hidden", "hidden_units")]
)
def test_a_near_miss_is_answered_with_what_was_meant(given: str, meant: str) -> None:
    assert f"Did you mean {meant}?" in unknown_name(given, list(TrainingConfig.model_fields))


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    assert "Did you mean" not in unknown_name("xyzzy", list(TrainingConfig.model_fields))


@pytest.mark.parametrize("flag", ["--epochs", "--data"])
def test_a_flag_without_its_value_is_refused_naming_it(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"{flag}.*expected one argument.*--help"):
        parse_arguments([flag])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "0"), ("learning_rate", "-1"), ("learning_rate", "nan"), ("learning_rate", "fast"),
        ("batch_size", "1"), ("batch_size", "1.5"), ("epochs", "0"), ("epochs", ""), ("momentum", "1"),
        ("momentum", "-0.1"), ("optimizer", "adam"),
        ("weight_decay", "-1"), ("schedule", "linear"), ("augment", "rotate"), ("side", "7"),
        ("side", "1025"), ("hidden_units", "0"), ("precision", "fp16"), ("seed", "-1"), ("seed", str(2**63)),
        ("validation_fraction", "0"),
        ("validation_fraction", "1"), ("broken_files", "ignore"), ("device", "tpu"), ("loader_workers", "-1"),
        ("layer_decay", "0"), ("layer_decay", "1.1"), ("warmup_epochs", "-1"), ("unfreeze_at", "1"),
        ("unfreeze_rate", "0"), ("mixup", "-1"), ("mixup", "11"), ("cutmix", "-1"), ("label_smoothing", "1"),
        ("ema_decay", "1"), ("clip_norm", "inf"), ("early_stopping", "-1"), ("feature_cache", "maybe"),
        ("cache_crops", "65"), ("compile", "perhaps"), ("checkpoint_every_s", "-1"), ("checkpoint_every_s", "nan"),
        ("model_name", ""), ("model_name", "two words"), ("model_name", "-dash"), ("model_name", "a" * 64),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_flag(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        create(**{name: value})
    assert str(refused.value).startswith(f"--{name.replace('_', '-')} {value}: ")


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--epochs 0: .*; --device tpu: "):
        create(epochs="0", device="tpu")


def test_what_is_missing_is_named_with_what_it_is_for() -> None:
    with pytest.raises(ConfigError) as refused:
        TrainingConfig.create({})
    assert "--data is missing: folder with cifar-100-python/" in str(refused.value)
    assert "--output is missing: folder to write the artifact into" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ("none", ()),
        ("stem", ("stem",)),
        ("stem,layer1", ("stem", "layer1")),
        (" stem , layer4 ", ("stem", "layer4")),
        ("stem,layer1,layer2,layer3,layer4", ("stem", "layer1", "layer2", "layer3", "layer4")),
    ],
)
def test_freeze_takes_block_names_with_commas_or_none(given: str, blocks: tuple[str, ...]) -> None:
    assert from_flags("--freeze", given).freeze == blocks
    assert create(freeze=blocks).freeze == blocks


def test_nothing_is_frozen_by_default_where_there_is_nothing_to_keep() -> None:
    assert from_flags("--weights", "none").frozen == ()
    assert from_flags("--weights", "none", "--freeze", "stem").frozen == ("stem",)


@pytest.mark.parametrize("given", ["layer5", "fc", "stem,,layer1", "", "none,stem", "stem layer1"])
def test_freeze_refuses_what_is_no_block_naming_it(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--freeze.*'stem', 'layer1', 'layer2', 'layer3' or 'layer4'"):
        create(freeze=given)


@pytest.mark.parametrize("quote", ["{}", '"{}"'], ids=["plain", "JSON-quoted"])
def test_sagemakers_strings_are_taken_quoted_or_not(quote: str) -> None:
    given = {name: quote.format(value) for name, value in EXAMPLES.items()}
    assert parse_hyperparameters(given) == EXAMPLES
    assert TrainingConfig.create(parse_hyperparameters(given)) == TrainingConfig.create(EXAMPLES)


def test_a_value_that_is_json_but_no_string_stays_the_text_it_was() -> None:
    given = {"epochs": "3", "weights": "null", "model_name": "true", "learning_rate": "1e-3"}
    assert parse_hyperparameters(given) == given


def test_names_that_sagemaker_adds_for_itself_are_left_out() -> None:
    given = {
        "sagemaker_program": '"train.py"',
        "sagemaker_region": "eu",
        "_tuning_objective_metric": "loss",
        "seed": "1",
    }
    assert parse_hyperparameters(given) == {"seed": "1"}


def test_flags_win_over_hyperparameters_and_these_over_defaults() -> None:
    values = {**PLACES, **parse_hyperparameters({"epochs": "5", "seed": "5"}), **parse_arguments(["--epochs", "9"])}
    config = TrainingConfig.create(values)
    assert (config.epochs, config.seed, config.batch_size) == (9, 5, 128)
