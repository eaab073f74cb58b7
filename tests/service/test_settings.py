"""Settings: flags over environment over defaults; what is unknown or not allowed is refused with a sentence."""

from pathlib import Path

import pytest

from service.settings import Settings, names


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*names(), "SAGEMAKER_BIND_TO_PORT"]:
        monkeypatch.delenv(name, raising=False)


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        Settings.load(flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_sagemakers_port_and_limits() -> None:
    settings = Settings.load([])
    assert (settings.port, settings.max_payload_bytes) == (8080, 25 * 2**20)
    assert settings.deadline_s < 60


def test_flags_override_environment_overrides_sagemakers_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "7001")
    assert Settings.load([]).port == 7001
    monkeypatch.setenv("CLASSIFIER_PORT", "7002")
    monkeypatch.setenv("CLASSIFIER_MODEL", "from-environment")
    assert Settings.load([]).port == 7002
    settings = Settings.load(["--port", "7003", "--model", "from-flag"])
    assert (settings.port, settings.model) == (7003, Path("from-flag"))


def test_an_unknown_variable_is_refused_and_the_known_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLASSIFIER_PROT", "1")
    message = refusal(capsys)
    assert "CLASSIFIER_PROT" in message
    assert all(name in message for name in names())


def test_a_variable_that_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASSIFIER_PORT", "")
    monkeypatch.setenv("CLASSIFIER_PAGE", "")
    assert Settings.load([]) == Settings()


def test_a_variable_in_other_letters_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("classifier_port", "9000")
    assert "unknown setting classifier_port; known are: " in refusal(capsys)


@pytest.mark.parametrize("port", ["0", "65536", "http", ""])
def test_a_port_that_is_none_is_refused_by_name_and_value(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--port", port).startswith(f"error: --port {port}: input should be ")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SAGEMAKER_BIND_TO_PORT", "abc", "error: SAGEMAKER_BIND_TO_PORT=abc: input should be a valid integer"),
        ("CLASSIFIER_WORKERS", "-1", "error: CLASSIFIER_WORKERS=-1: input should be greater than or equal to 0"),
        ("CLASSIFIER_DEADLINE_S", "inf", "error: CLASSIFIER_DEADLINE_S=inf: input should be a finite number"),
        ("CLASSIFIER_MAX_BODY_BYTES", "9", "error: CLASSIFIER_MAX_BODY_BYTES = 9 is less than CLASSIFIER_MAX_PAYLO"),
    ],
)
def test_what_a_variable_may_not_be_is_refused_by_its_name(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert refusal(capsys).startswith(said)


def test_an_address_is_no_model_and_its_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "s3://***@host/model.tar.gz: that is an address; copy the model to this machine"
    assert refusal(capsys, "--model", "s3://me:pw@host/model.tar.gz").startswith(f"error: --model {said}")
    monkeypatch.setenv("CLASSIFIER_MODEL", "s3://me:p@w@host/model.tar.gz")
    assert refusal(capsys).startswith(f"error: CLASSIFIER_MODEL={said}")
    monkeypatch.setenv("CLASSIFIER_MODEL", "model")
    monkeypatch.setenv("CLASSIFIER_PORT", "tcp://me:pw@host:80")
    assert refusal(capsys).startswith("error: CLASSIFIER_PORT=tcp://***@host:80: input should be")


def test_flags_that_are_empty_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """As of a variable of the shell that is not set: 0.0.0.0 and the folder we are in would be taken."""
    assert refusal(capsys, "--host", "").startswith("error: --host : string should have at least 1 character")
    assert refusal(capsys, "--model", "").startswith("error: --model : that is no name; name a folder or .tar.gz")


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mode" in refusal(capsys, "--mode", "x")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load([]).port = 1  # type: ignore[misc]


OTHERS = {
    "model": "elsewhere", "host": "::1", "port": "9000", "engine": "torch", "workers": "3", "engine_threads": "5",
    "max_payload_bytes": "1000", "max_body_bytes": "99999999", "body_timeout_s": "2.5", "start_timeout_s": "99",
    "deadline_s": "7", "max_images": "9", "max_queue_s": "1.5", "overload_status": "429", "drain_s": "1.5",
    "max_batch": "4", "max_wait_ms": "3", "decode_threads": "6", "decode_limit_s": "1.5", "page": "false",
    "log_level": "debug", "log_format": "json",
    "exit_with_parent": "false",
}  # fmt: skip
"""A value for each setting that is not its default."""


def test_every_setting_can_be_set_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(OTHERS) == set(Settings.model_fields)
    before = Settings.load([])
    for field, value in OTHERS.items():
        with monkeypatch.context() as only_this:
            only_this.setenv(f"CLASSIFIER_{field.upper()}", value)
            after = Settings.load([])
        assert str(getattr(after, field)).lower() in (value, f"{value}.0")
        assert after.model_dump(exclude={field}) == before.model_dump(exclude={field})
