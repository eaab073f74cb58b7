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


@pytest.mark.parametrize("port", ["0", "65536", "http", ""])
def test_a_port_that_is_none_is_refused_by_name_and_value(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"port = '{port}'" in refusal(capsys, "--port", port)


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mode" in refusal(capsys, "--mode", "x")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load([]).port = 1  # type: ignore[misc]
