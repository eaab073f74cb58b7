"""Verdicts of the debugging rules as the page shows them: firings of one kind on one line, each advice once."""

from collections.abc import Mapping
from dataclasses import dataclass

from training.report.charts import plain
from training.report.sources import Record, finite, records

VERDICTS = {"IssuesFound": ("issues found", "bad"), "NoIssuesFound": ("no issues", "ok")}
SHOWN_LINES = 5
SHOWN_STEPS = 6


@dataclass(frozen=True)
class FiringView:
    """What was seen, and at which steps."""

    where: str
    message: str
    detail: str


@dataclass(frozen=True)
class RuleView:
    """One row of the table."""

    name: str
    verdict: str
    kind: str
    """Of the verdict: "ok", "bad", or empty."""
    note: str
    """Why there is no verdict; mostly empty."""
    parameters: dict[str, object]
    firings: tuple[FiringView, ...]
    more: int
    """Firings that are not shown."""
    advice: tuple[str, ...]


def rule_views(rules: list[Record] | None) -> list[RuleView] | None:
    """The rows, those that found issues first; None where no rule watched."""
    if rules is None:
        return None
    return sorted((_view(rule) for rule in rules), key=lambda view: (view.kind != "bad", view.kind != "ok"))


def unjudged(rule: Record) -> bool:
    """Whether a rule found no issues because it could not judge."""
    return rule.get("status") == "NoIssuesFound" and rule.get("judged") is False


def _view(rule: Record) -> RuleView:
    status = str(rule.get("status", "unknown"))
    verdict, kind = VERDICTS.get(status, (status, ""))
    note = _text(rule, "unjudged") or _text(rule, "message")
    if unjudged(rule):
        verdict, kind = "not judged", ""
    alike: dict[tuple[str, str], list[Record]] = {}
    for firing in records(rule.get("firings")):
        alike.setdefault((_text(firing, "message"), _text(firing, "tensor")), []).append(firing)
    shown = list(alike.items())[:SHOWN_LINES]
    advice = dict.fromkeys(_text(firing, "advice") for _, firings in shown for firing in firings)
    parameters = rule.get("parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    return RuleView(
        name=_text(rule, "rule") or "?",
        verdict=verdict,
        kind=kind,
        note=note,
        parameters={name: value for name, value in parameters.items() if value is not None},
        firings=tuple(_firing(message, tensor, firings) for (message, tensor), firings in shown),
        more=sum(len(firings) for firings in list(alike.values())[SHOWN_LINES:]),
        advice=tuple(text for text in advice if text),
    )


def _firing(message: str, tensor: str, firings: list[Record]) -> FiringView:
    steps = [f"{step:.0f}" for firing in firings if (step := finite(firing.get("step"))) is not None]
    where = ""
    if steps:
        left = len(steps) - SHOWN_STEPS
        listed = ", ".join(steps[:SHOWN_STEPS]) + (f" and {left} more" if left > 0 else "")
        where = f"{'Step' if len(steps) == 1 else 'Steps'} {listed}: "
    value, threshold = finite(firings[-1].get("value")), finite(firings[-1].get("threshold"))
    parts = [tensor] if tensor else []
    parts += [f"{plain(value)}"] if value is not None else []
    parts += [f"threshold {plain(threshold)}"] if threshold is not None else []
    return FiringView(where, message, f"({', '.join(parts)})" if parts else "")


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    return "" if value is None else str(value)
