"""Fail when a locked dependency of the service has a known vulnerability that audit-allow.toml does not accept.

What the service installs (the base dependencies and the group `tracing`, for this platform) is exported from uv.lock
and given to pip-audit, which asks OSV (https://osv.dev) about each package. Where OSV cannot be asked, this says so
and asks PyPI (https://docs.pypi.org/api/json/, `vulnerabilities`), as pip-audit does by default; a mirror of it may
answer for the newest release alone. Of what PyPI is silent about, what was read by hand stands: advisories.md must have
a row at this very version, read within sixty days, that does not call it affected or names what is accepted.

Exit status: 0 no vulnerability that is not accepted, by OSV, by PyPI or as read by hand; 1 such a one, an entry of the
list that has ended, or a package that neither answers for and that was not read at its version or too long ago.
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OSV = "https://api.osv.dev/v1/query"
PYPI = "https://pypi.org/pypi"
ANSWER_LIMIT_S = 15
LONGEST = timedelta(days=184)
GROUPS = ("tracing",)
FIELDS = {"id": str, "package": str, "reason": str, "since": date, "until": date}
BUNDLED = "bundled"
"""Field of an entry about a library inside a package's wheel, which no database names by the package."""

VERSION = "version"
"""Field of an entry that accepts at this version of the package only, where more than one is locked."""

READ_DAYS = 60
"""So long what was read by hand stands for the database. Not a month: a build must not turn red overnight for that."""

COLUMNS = 5
"""Of the tables in advisories.md: package, locked, newest, advisories, affected."""

VERDICT = re.compile(r"(?:no|unknown)\b|yes: ((?:CVE|GHSA|PYSEC)-[\w-]+(?:, (?:CVE|GHSA|PYSEC)-[\w-]+)*)(?=$|;)")
"""How the last column begins: no, no known (searched, nothing found), unknown, or yes and by what."""


class Row(NamedTuple):
    """What was read by hand of a package's version."""

    day: date
    ids: tuple[str, ...]
    """What affects it; empty where nothing is known to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv-url", default=OSV, help="where to ask (default: %(default)s)")
    parser.add_argument("--allow", type=Path, default=Path(__file__).parent / "audit-allow.toml", help="accepted ones")
    parser.add_argument("--pypi-url", default=PYPI, help="where to ask if not there (default: %(default)s)")
    advisories = Path(__file__).parent / "advisories.md"
    parser.add_argument("--advisories", type=Path, default=advisories, help="what was read by hand, and when")
    parser.add_argument(
        "--today", type=date.fromisoformat, default=datetime.now(UTC).date(), help="(default: %(default)s)"
    )
    parser.add_argument("--requirements", type=Path, help="audit these instead of what uv.lock has for the service")
    options = parser.parse_args(arguments)

    allowed, problems = read_allowed(options.allow, options.today)
    with tempfile.TemporaryDirectory() as scratch:
        requirements = options.requirements or exported(Path(scratch) / "requirements.txt")
        if (why := unreachable(options.osv_url)) is None:
            packages = asked(requirements, options.osv_url)
            said = f"{len(packages)} packages asked about"
        else:
            wanted = pinned(requirements.read_text())
            answered = from_pypi(wanted, options.pypi_url)
            packages, days, unread = read(wanted, answered, options.advisories)
            said = f"{options.osv_url} cannot be asked for known vulnerabilities from here ({why}); of {len(wanted)} "
            said += f"packages PyPI answered for {len(answered)}"
            if days:
                said += f", the others are as read by hand on {' and '.join(map(str, days))}"
            problems += unread + too_old(options.advisories.name, days, options.today)
    found, unused, accepted = judged(packages, allowed)
    problems += found
    for entry in unused:
        print(f"audit: {entry['id']} of {entry['package']} is accepted in {options.allow.name} but no longer found")
    print(f"audit: {said}, {accepted} vulnerabilities accepted")
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    return 1 if problems else 0


def read_allowed(path: Path, today: date) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of the list that hold today, and a sentence for each that does not."""
    entries = tomllib.loads(path.read_text()).get("allow", [])
    allowed, problems = [], []
    for entry in entries:
        wrong = [name for name, kind in FIELDS.items() if not isinstance(entry.get(name), kind) or not entry[name]]
        if wrong or set(entry) - {*FIELDS, BUNDLED, VERSION}:
            problems.append(
                f"{path.name}: an entry needs {', '.join(FIELDS)} and, of a library inside, {BUNDLED}, of one version, "
                f"{VERSION}: {entry}"
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


def read_rows(path: Path) -> tuple[dict[tuple[str, str], Row], list[str]]:
    """What the tables have by package and version, the later one where two do; a sentence for each row that is none."""
    rows: dict[tuple[str, str], Row] = {}
    problems, day = [], None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if said := re.match(r"Read by hand on (\d{4}-\d\d-\d\d)", line):
            day = date.fromisoformat(said[1])
        if not line.startswith("|") or line.startswith(("| package |", "| --- |")):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        verdict = VERDICT.match(cells[-1])
        if day is None:
            return {}, [f"{path.name} does not tell when it was read ('Read by hand on YYYY-MM-DD' above its tables)"]
        if len(cells) != COLUMNS or verdict is None:
            problems.append(
                f"{path.name}, line {number}: a row has {COLUMNS} columns, the last of which begins with no, no known, "
                f"unknown or 'yes: ID, ID': {line[:60]}..."
            )
        else:
            ids = tuple(verdict[1].split(", ")) if verdict[1] else ()
            rows[canonicalize_name(cells[0]), cells[1]] = Row(day, ids)
    return rows, problems


def read(
    packages: Iterable[tuple[str, str]], answered: dict[tuple[str, str], list[dict[str, Any]]], path: Path
) -> tuple[list[dict[str, Any]], list[date], list[str]]:
    """What was answered and read by hand of each package, as pip-audit would say it.

    Also returns the days of the readings that stand alone, and a sentence for each package that has neither.
    """
    rows, problems = read_rows(path)
    if problems and not rows:
        packages = [each for each in packages if each in answered]
    there: list[dict[str, Any]] = []
    days = set()
    for name, version in packages:
        row, vulnerabilities = rows.get((name, version)), answered.get((name, version), [])
        if row is None and (name, version) not in answered:
            others = " and ".join(each for of, each in rows if of == name) or "no version of it"
            problems.append(
                f"{name} {version} is locked, what was read by hand is {others}: read the advisories of {version} and "
                f"add its row to {path.name}, or run this where api.osv.dev or pypi.org answers for it"
            )
            continue
        if row is not None:
            named = {each for told in vulnerabilities for each in (told["id"], *told["aliases"])}
            fixed = [f"what {path.name} tells"]
            more = [{"id": each, "aliases": [], "fix_versions": fixed} for each in row.ids if each not in named]
            vulnerabilities = [*vulnerabilities, *more]
            if (name, version) not in answered:
                days.add(row.day)
        there.append({"name": name, "version": version, "vulns": vulnerabilities})
    return there, sorted(days), problems


def too_old(name: str, days: list[date], today: date) -> list[str]:
    """A sentence where the oldest of what was read by hand is no longer to be relied on."""
    age = today - min(days, default=today)
    if age <= timedelta(days=READ_DAYS):
        return []
    return [
        f"{name} was read {age.days} days ago, {READ_DAYS} are allowed where no database answers: run this where "
        "api.osv.dev or pypi.org does, or read the advisories of those rows anew and give them the new date"
    ]


def unreachable(url: str) -> str | None:
    """Why the database does not answer a plain question; None when it does."""
    question = json.dumps({"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "1.0"}).encode()
    request = urllib.request.Request(url, question, {"Content-Type": "application/json"})  # noqa: S310  # ours
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as answer:  # noqa: S310
            json.load(answer)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        return str(exc.reason if isinstance(exc, urllib.error.URLError) else exc) or type(exc).__name__
    return None


def from_pypi(packages: Sequence[tuple[str, str]], url: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What PyPI says of each package, as pip-audit would say it; without those for whose version it has no answer."""

    def vulnerabilities(package: tuple[str, str]) -> list[dict[str, Any]] | None:
        name, version = package
        for address in (f"{url}/{name}/{version}/json", f"{url}/{name}/json"):
            try:
                with urllib.request.urlopen(address, timeout=ANSWER_LIMIT_S) as response:  # noqa: S310  # ours
                    told = json.load(response)
                if told["info"]["version"] == version:
                    return [
                        {"id": each["id"], "aliases": each["aliases"], "fix_versions": each["fixed_in"]}
                        for each in told["vulnerabilities"] if not each.get("withdrawn")
                    ]  # fmt: skip
            except urllib.error.HTTPError:
                continue
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError):
                break
        return None

    with ThreadPoolExecutor(8) as pool:
        said = zip(packages, pool.map(vulnerabilities, packages), strict=True)
        return {package: found for package, found in said if found is not None}


def exported(requirements: Path) -> Path:
    """The file, with what uv.lock has for the service."""
    command = [os.environ.get("UV", "uv"), "export", "--quiet", "--frozen", "--no-default-groups", "--no-hashes"]
    command += ["--no-header", "--no-annotate", *(f"--group={group}" for group in GROUPS)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S603
    requirements.write_text(result.stdout)
    return requirements


def pinned(requirements: str) -> list[tuple[str, str]]:
    """Name and version of each requirement that holds on this machine."""
    wanted = [Requirement(line) for line in requirements.splitlines() if line and not line.startswith("#")]
    return [
        (canonicalize_name(each.name), str(each.specifier).removeprefix("=="))
        for each in wanted if each.marker is None or each.marker.evaluate()
    ]  # fmt: skip


def asked(requirements: Path, url: str) -> list[dict[str, Any]]:
    """What pip-audit says of each package. Raises: SystemExit where it says nothing."""
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


def judged(
    packages: list[dict[str, Any]], allowed: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]], int]:
    """A sentence for each vulnerability not accepted; the entries of these packages that accept none; how many are."""
    problems, used, known = [], [], []
    for package in packages:
        if "skip_reason" in package:
            problems.append(f"{package['name']} could not be audited: {package['skip_reason']}")
            continue
        name, version = package["name"], package["version"]
        entries = [e for e in allowed if e["package"] == name and e.get(VERSION, version) == version]
        known += entries
        for vulnerability in package["vulns"]:
            names = {vulnerability["id"], *vulnerability["aliases"]}
            accepting = [e for e in entries if e["id"] in names]
            used += accepting
            if not accepting:
                fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
                problems.append(
                    f"{name} {version} has the known vulnerability {', '.join(sorted(names))} (mended in {fixed}): "
                    f"uv lock --upgrade-package {name}, or accept it with a reason and an end in .ci/audit-allow.toml"
                )
    return problems, [e for e in known if e not in used and BUNDLED not in e], len(used)


if __name__ == "__main__":
    sys.exit(main())
