"""What was asked for by name and is not installed is refused before anything is read."""

import importlib.util
import sys

import pytest

from training.errors import ConfigError
from training.instrumentation import Instrumentation


def test_smdebug_is_refused_where_it_is_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smdebug.pytorch", None)  # what an import of a missing module meets
    with pytest.raises(ConfigError, match=r"--debugger on needs smdebug.* `uv sync --inexact --group debugger`"):
        Instrumentation(debugger="on").callbacks(None)
    assert Instrumentation(debugger="auto").callbacks(None)


def test_mlflow_is_refused_where_it_is_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else found(name))
    with pytest.raises(ConfigError, match=r"--mlflow-uri http://there needs mlflow.* `uv sync --inexact --group mlf"):
        Instrumentation(mlflow_uri="http://there").callbacks(None)
