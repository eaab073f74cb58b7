"""Fail when a locked dependency of the service has a known vulnerability that audit-allow.toml does not accept.

What the service installs (the base dependencies and the group `tracing`, for this platform) is exported from uv.lock
and given to pip-audit, which asks OSV (https://osv.dev) about each package. Without a network this says so; what was
read by hand (advisories.md) then counts, for sixty days.

Exit status: 0 nothing found, or nothing could be asked; 1 a vulnerability, an entry of the list that has ended, or
nothing could be asked and what was read by hand is too old.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OSV = "https://api.osv.dev/v1/query"
LONGEST = timedelta(days=184)
GROUPS = ("tracing",)
FIELDS = {"id": str, "package": str, "reason": str, "since": date, "until": date}
BUNDLED = "bundled"
"""Field of an entry about a library inside a package's wheel, which no database names by the package."""

READ_DAYS = 60
"""So long what was read by hand stands for the database. Not a month: a build must not turn red overnight for that."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv-url", default=OSV, help="where to ask (default: %(default)s)")
    parser.add_argument("--allow", type=Path, default=Path(__file__).parent / "audit-allow.toml", help="accepted ones")
    advisories = Path(__file__).parent / "advisories.md"
    parser.add_argument("--advisories", type=Path, default=advisories, help="what was read by hand, and when")
    parser.add_argument("--requirements", type=Path, help="audit these instead of what uv.lock has for the service")
    options = parser.parse_args(arguments)

    today = datetime.now(UTC).date()
    allowed, problems = read_allowed(options.allow, today)
    if (why := unreachable(options.osv_url)) is not None:
        print(f"audit: skipped, {options.osv_url} cannot be asked for known vulnerabilities from here ({why})")
        problems += too_old(options.advisories, today)
    else:
        packages = audited(options.requirements, options.osv_url)
        found, unused = judged(packages, allowed)
        problems += found
        for entry in unused:
            print(f"audit: {entry['id']} of {entry['package']} is accepted in {options.allow.name} but no longer found")
        print(f"audit: {len(packages)} packages asked about, {len(allowed) - len(unused)} vulnerabilities accepted")
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    return 1 if problems else 0


def read_allowed(path: Path, today: date) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of the list that hold today, and a sentence for each that does not."""
    entries = tomllib.loads(path.read_text()).get("allow", [])
    allowed, problems = [], []
    for entry in entries:
        wrong = [name for name, kind in FIELDS.items() if not isinstance(entry.get(name), kind) or not entry[name]]
        if wrong or set(entry) - {*FIELDS, BUNDLED}:
            problems.append(
                f"{path.name}: an entry needs {', '.join(FIELDS)} and, of a library inside, {BUNDLED}: {entry}"
            )
        elif entry["until"] - entry["since"] > LONGEST:
            problems.append(f"{path.name}: {entry['id']} is accepted for longer than {LONGEST.days} days; choose less")
        elif entry["until"] < today:
            problems.append(
                f"{path.name}: {entry['id']} of {entry['package']} was accepted until {entry['until']}; "
                "upgrade the package, or give the entry a new end and reason"
            )
        else:
            allowed.append(entry)
    return allowed, problems


def too_old(path: Path, today: date) -> list[str]:
    """A sentence where what was read by hand is no longer to be relied on."""
    said = re.search(r"^Read by hand on (\d{4}-\d\d-\d\d)", path.read_text(), re.MULTILINE)
    if said is None:
        return [f"{path.name} does not tell when it was read ('Read by hand on YYYY-MM-DD')"]
    age = today - date.fromisoformat(said[1])
    if age <= timedelta(days=READ_DAYS):
        return []
    return [
        f"{path.name} was read {age.days} days ago, {READ_DAYS} are allowed where no database can be asked: run this "
        "where api.osv.dev can be reached, or read the advisories anew and change the file's date"
    ]


def unreachable(url: str) -> str | None:
    """Why the database does not answer a plain question; None when it does."""
    question = json.dumps({"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "1.0"}).encode()
    request = urllib.request.Request(url, question, {"Content-Type": "application/json"})  # noqa: S310  # ours
    try:
        with urllib.request.urlopen(request, timeout=15) as answer:  # noqa: S310
            json.load(answer)
    except (OSError, ValueError) as exc:
        return str(exc.reason if isinstance(exc, urllib.error.URLError) else exc) or type(exc).__name__
    return None


def audited(requirements: Path | None, url: str) -> list[dict[str, Any]]:
    """What pip-audit says of each package. Raises: SystemExit where it says nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        if requirements is None:
            requirements = Path(scratch) / "requirements.txt"
            uv = os.environ.get("UV", "uv")
            command = [uv, "export", "--quiet", "--frozen", "--no-default-groups", "--no-header", "--no-annotate"]
            command += [f"--group={group}" for group in GROUPS]
            exported = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S603
            requirements.write_text(exported.stdout)
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--disable-pip"]
        command += ["--no-deps", "--vulnerability-service", "osv", "--osv-url", url, "--format", "json"]
        result = subprocess.run(  # noqa: S603
            [*command, "--progress-spinner", "off"], check=False, capture_output=True, text=True
        )
    try:
        packages: list[dict[str, Any]] = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise SystemExit(f"audit: pip-audit failed:\n{result.stderr}") from None
    return packages


def judged(packages: list[dict[str, Any]], allowed: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """A sentence for each vulnerability that is not accepted, and the entries that accept nothing."""
    problems, used = [], []
    for package in packages:
        if "skip_reason" in package:
            problems.append(f"{package['name']} could not be audited: {package['skip_reason']}")
        for vulnerability in package.get("vulns", []):
            names = {vulnerability["id"], *vulnerability["aliases"]}
            accepting = [e for e in allowed if e["id"] in names and e["package"] == package["name"]]
            used += accepting
            if not accepting:
                fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
                problems.append(
                    f"{package['name']} {package['version']} has the known vulnerability {', '.join(sorted(names))} "
                    f"(mended in {fixed}): uv lock --upgrade-package {package['name']}, or accept it with a reason "
                    "and an end in .ci/audit-allow.toml"
                )
    return problems, [entry for entry in allowed if entry not in used and BUNDLED not in entry]


if __name__ == "__main__":
    sys.exit(main())
