"""The service's dependencies have no known vulnerability, and the service listens on nothing but its port."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import answered_by
from tests.service.served import png

ROOT = Path(__file__).parent.parent
AUDIT = ROOT / ".ci/audit.py"

# --- the audit, against a database of vulnerabilities that speaks OSV's protocol (https://google.github.io/osv.dev/api/)

JINJA = {
    "id": "GHSA-h5c8-rqwp-cp95", "aliases": ["CVE-2024-22195"], "summary": "XSS", "modified": "2024-01-11T00:00:00Z",
    "affected": [{"package": {"name": "jinja2", "ecosystem": "PyPI"}, "ranges": [
        {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.1.3"}]}]}],
}  # fmt: skip


@contextmanager
def database(vulnerabilities: dict[str, Any], status: int = 200) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = vulnerabilities.get(question["package"]["name"])
            body = json.dumps({"vulns": [known]} if known else {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with answered_by(Handler) as url:
        yield f"{url}/v1/query"


@contextmanager
def pypi(newest: dict[str, str], vulnerabilities: dict[str, Any], versions: bool) -> Iterator[str]:
    """One that speaks PyPI's protocol (https://docs.pypi.org/api/json/); as mirrors do, perhaps of the newest alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, name, *version, _ = self.path.split("/")
            known = name in newest and (versions or not version)
            told = {"info": {"version": "".join(version) or newest.get(name)}}
            body = json.dumps(told | {"vulnerabilities": vulnerabilities.get(name, [])}).encode() if known else b""
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with answered_by(Handler) as url:
        yield url


def audit(
    tmp_path: Path, url: str, allow: str = "", requirements: str = "jinja2==3.1.2\nidna==3.10\n", read: str = "",
    pypi_url: str = "http://127.0.0.1:9",
) -> Any:  # fmt: skip
    (tmp_path / "allow.toml").write_text(allow)
    (tmp_path / "requirements.txt").write_text(requirements)
    (tmp_path / "advisories.md").write_text(read or table(TODAY, JINJA_ROW, IDNA_ROW))
    command = [sys.executable, str(AUDIT), "--osv-url", url, "--pypi-url", pypi_url, "--today", str(TODAY)]
    command += ["--allow", str(tmp_path / "allow.toml"), "--advisories", str(tmp_path / "advisories.md")]
    return subprocess.run(
        [*command, "--requirements", str(tmp_path / "requirements.txt")], capture_output=True, text=True, timeout=120
    )


def table(read: Any, *rows: str) -> str:
    """As `.ci/advisories.md` has them."""
    head = ["| package | locked | newest | advisories | affected |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([f"Read by hand on {read}, where nothing could be asked.", "", *head, *rows, "", ""])


def entry(since: date, until: date, id: str = "CVE-2024-22195") -> str:
    what = f'id = "{id}"\npackage = "jinja2"\nreason = "No template is ours."'
    return f"[[allow]]\n{what}\nsince = {since}\nuntil = {until}\n"


TODAY = date.today()  # and for the audit too, where midnight passes while the tests run
SOON = TODAY + timedelta(days=30)
NOWHERE = "http://127.0.0.1:9/v1/query"
IDNA_ROW = "| idna | 3.10 | 3.20 | PYSEC-2026-215 | no |"
JINJA_ROW = "| jinja2 | 3.1.2 | 3.1.6 | none found | no known; not searched further |"
AFFECTED_ROW = "| Jinja2 | 3.1.2 | 3.1.6 | -> 3.1.3 | yes: CVE-2024-22195, CVE-2024-34064; no template is ours |"


def test_a_known_vulnerability_fails_and_says_what_to_do(tmp_path: Path) -> None:
    with database({"jinja2": JINJA}) as url:
        result = audit(tmp_path, url)
    assert result.returncode == 1
    assert (
        "jinja2 3.1.2 has the known vulnerability CVE-2024-22195, GHSA-h5c8-rqwp-cp95 (mended in 3.1.3)"
        in result.stderr
    )
    assert "idna" not in result.stderr


def test_an_accepted_vulnerability_passes_until_its_end(tmp_path: Path) -> None:
    with database({"jinja2": JINJA}) as url:
        accepted = audit(tmp_path, url, entry(TODAY, SOON))
        ended = audit(tmp_path, url, entry(TODAY - timedelta(days=30), TODAY - timedelta(days=1)))
        endless = audit(tmp_path, url, entry(TODAY, TODAY + timedelta(days=1000)))
        another = audit(tmp_path, url, entry(TODAY, SOON, id="CVE-1-1"))
        unreasoned = audit(tmp_path, url, entry(TODAY, SOON).replace("No template is ours.", ""))
    assert (accepted.returncode, accepted.stderr) == (0, "")
    assert "2 packages asked about, 1 vulnerabilities accepted" in accepted.stdout
    assert ended.returncode == 1 and "was accepted until" in ended.stderr
    assert endless.returncode == 1 and "longer than 184 days" in endless.stderr
    assert (
        another.returncode == 1 and "CVE-1-1 of jinja2 is accepted in allow.toml but no longer found" in another.stdout
    )
    assert unreasoned.returncode == 1 and "an entry needs id, package, reason, since, until" in unreasoned.stderr


def test_without_a_database_one_line_says_what_was_read_by_hand_and_when(tmp_path: Path) -> None:
    with database({}, status=403) as refusing:
        for url in (NOWHERE, refusing):
            result = audit(tmp_path, url)
            assert (result.returncode, result.stderr) == (0, "")
            (line,) = result.stdout.splitlines()
            assert line.startswith(f"audit: {url} cannot be asked for known vulnerabilities from here (")
            assert line.endswith(f"the others are as read by hand on {TODAY}, 0 vulnerabilities accepted")
            assert "of 2 packages PyPI answered for 0" in line


def test_what_was_read_by_hand_counts_for_sixty_days_where_no_database_can_be_asked(tmp_path: Path) -> None:
    def read(days: int) -> str:
        return table(TODAY - timedelta(days=days), JINJA_ROW, IDNA_ROW)

    assert audit(tmp_path, NOWHERE, read=read(60)).returncode == 0
    late = audit(tmp_path, NOWHERE, read=read(61))
    assert late.returncode == 1 and "advisories.md was read 61 days ago, 60 are allowed" in late.stderr
    (undated,) = audit(tmp_path, NOWHERE, read=table("some day", JINJA_ROW)).stderr.splitlines()
    assert "does not tell when it was read" in undated
    with database({}) as url:
        assert audit(tmp_path, url, read=read(1000)).returncode == 0


def test_the_oldest_reading_of_what_is_installed_counts(tmp_path: Path) -> None:
    old, new = TODAY - timedelta(days=61), TODAY - timedelta(days=1)
    relied_on = audit(tmp_path, NOWHERE, read=table(old, IDNA_ROW) + table(new, JINJA_ROW))
    assert relied_on.returncode == 1 and "was read 61 days ago" in relied_on.stderr
    assert f"the others are as read by hand on {old} and {new}" in relied_on.stdout
    other = table(old, JINJA_ROW, "| flask | 3.0.0 | 3.1.0 | none | no |") + table(new, JINJA_ROW, IDNA_ROW)
    assert audit(tmp_path, NOWHERE, read=other).returncode == 0


def test_without_a_database_a_version_that_nobody_read_fails(tmp_path: Path) -> None:
    result = audit(tmp_path, NOWHERE, requirements="jinja2==3.1.6\nidna==3.10\nflask==3.0.0 ; python_version > '3'\n")
    assert result.returncode == 1
    upgraded, unknown = result.stderr.splitlines()
    assert upgraded.startswith("audit: jinja2 3.1.6 is locked, what was read by hand is 3.1.2: read the advisories of")
    assert unknown.startswith("audit: flask 3.0.0 is locked, what was read by hand is no version of it: ")
    elsewhere = audit(tmp_path, NOWHERE, requirements="flask==3.0.0 ; python_version < '3'\nidna==3.10\n")
    assert elsewhere.returncode == 0 and "of 1 packages PyPI answered for 0" in elsewhere.stdout


def test_without_a_database_what_was_read_as_affected_fails_unless_accepted(tmp_path: Path) -> None:
    def read(allow: str) -> Any:
        return audit(tmp_path, NOWHERE, allow, read=table(TODAY, AFFECTED_ROW, IDNA_ROW))

    one = entry(TODAY, SOON)
    both = one + entry(TODAY, SOON, id="CVE-2024-34064")
    result = read(one)
    assert result.returncode == 1 and "CVE-2024-22195" not in result.stderr
    assert (
        "jinja2 3.1.2 has the known vulnerability CVE-2024-34064 (mended in what advisories.md tells)" in result.stderr
    )
    accepted = read(both)
    assert (accepted.returncode, accepted.stderr) == (0, "") and "2 vulnerabilities accepted" in accepted.stdout
    assert read(both + 'version = "3.1.2"\n').returncode == 0
    another = read(both + 'version = "3.1.1"\n')
    assert another.returncode == 1 and "CVE-2024-34064" in another.stderr


ESCAPE = {"id": "PYSEC-2024-1", "aliases": ["CVE-2024-22195"], "fixed_in": ["3.1.3"], "withdrawn": None}


@pytest.mark.parametrize("versions", [True, False])
def test_where_osv_cannot_be_asked_pypi_is(tmp_path: Path, versions: bool) -> None:
    """Of every version, or as a mirror has it of the newest alone; what it is silent about is as read by hand."""
    idna_row = table(TODAY, IDNA_ROW)
    with pypi({"jinja2": "3.1.2"}, {"jinja2": [ESCAPE, ESCAPE | {"id": "GONE", "withdrawn": "2024"}]}, versions) as url:
        found = audit(tmp_path, NOWHERE, read=idna_row, pypi_url=url)
        accepted = audit(tmp_path, NOWHERE, entry(TODAY, SOON), read=idna_row, pypi_url=url)
        silent = audit(tmp_path, NOWHERE, read=table(TODAY, JINJA_ROW), pypi_url=url)
        read_too = audit(tmp_path, NOWHERE, entry(TODAY, SOON), read=table(TODAY, AFFECTED_ROW, IDNA_ROW), pypi_url=url)
    assert found.returncode == 1 and "GONE" not in found.stderr
    assert "jinja2 3.1.2 has the known vulnerability CVE-2024-22195, PYSEC-2024-1 (mended in 3.1.3)" in found.stderr
    assert accepted.returncode == 0
    assert f"of 2 packages PyPI answered for 1, the others are as read by hand on {TODAY}, 1 vuln" in accepted.stdout
    assert silent.returncode == 1 and "idna 3.10 is locked, what was read by hand is no version" in silent.stderr
    assert read_too.returncode == 1 and "CVE-2024-34064 (mended in what advisories.md tells)" in read_too.stderr


def test_of_an_older_version_a_mirror_of_the_newest_says_nothing(tmp_path: Path) -> None:
    with pypi({"jinja2": "3.1.6", "idna": "3.20"}, {}, versions=False) as url:
        result = audit(tmp_path, NOWHERE, read=table(TODAY, AFFECTED_ROW, IDNA_ROW), pypi_url=url)
    assert result.returncode == 1 and "CVE-2024-22195" in result.stderr
    assert "PyPI answered for 0" in result.stdout


@pytest.mark.parametrize(
    "row",
    [
        "| jinja2 | 3.1.2 | none found | no |", "| jinja2 | 3.1.2 | 3.1.6 | one | or | two | no |",
        "| jinja2 | 3.1.2 | 3.1.6 | none found | |", "| jinja2 | 3.1.2 | 3.1.6 | none found | not read |",
        "| jinja2 | 3.1.2 | 3.1.6 | one | yes |", "| jinja2 | 3.1.2 | 3.1.6 | one | yes: CVE-2024-22195 and more |",
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_understood_fails(tmp_path: Path, row: str) -> None:
    result = audit(tmp_path, NOWHERE, read=table(TODAY, IDNA_ROW, row))
    assert result.returncode == 1
    malformed, unread = result.stderr.splitlines()
    assert malformed.startswith("audit: advisories.md, line 6: a row has 5 columns, the last of which begins with no, ")
    assert "jinja2 3.1.2 is locked" in unread


def test_a_library_inside_a_wheel_is_accepted_though_no_database_names_it(tmp_path: Path) -> None:
    with database({}) as url:
        result = audit(tmp_path, url, entry(TODAY, SOON) + 'bundled = "libpng 1.6.58"\n')
    assert (result.returncode, result.stderr) == (0, "")
    assert "no longer found" not in result.stdout


def test_the_lists_of_accepted_and_of_read_vulnerabilities_are_sound() -> None:
    spec = importlib.util.spec_from_file_location("audit", AUDIT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.read_allowed(ROOT / ".ci/audit-allow.toml", TODAY)[1] == []
    rows, wrong = module.read_rows(ROOT / ".ci/advisories.md")
    assert rows and wrong == []
    read = [{"name": name, "version": version, "vulns": [{"id": each, "aliases": [], "fix_versions": []}]}
            for (name, version), row in rows.items() for each in row.ids]  # fmt: skip
    problems, unused, _ = module.judged(read, tomllib.loads((ROOT / ".ci/audit-allow.toml").read_text())["allow"])
    assert (problems, unused) == ([], [])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which libraries a process has")
def test_no_process_of_the_service_loads_the_libpng_inside_pillow(server: Any) -> None:
    assert server.ask("POST", "/invocations", png(), {"Content-Type": "image/png"}).status == 200
    processes = psutil.Process(server.process.pid).children(recursive=True)
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in processes]
    assert [text for text in maps if "pillow.libs/libjpeg" in text]
    assert not [text for text in maps if "libpng" in text or "libfreetype" in text]


# --- what listens


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nothing_listens_but_the_port(artifact: Path, start_server: Any, workers: str) -> None:
    with start_server(artifact, CLASSIFIER_WORKERS=workers) as server:
        assert server.ask("POST", "/invocations", b"no image").status == 400
        supervisor = psutil.Process(server.process.pid)
        processes = [supervisor, *supervisor.children(recursive=True)]
        assert len(processes) >= int(workers) + (workers != "1")
        sockets = [each for process in processes for each in process.net_connections("all")]
        inet = {
            (each.type.name, tuple(each.laddr)) for each in sockets if each.family.name != "AF_UNIX" and not each.raddr
        }
        assert inet == {("SOCK_STREAM", ("127.0.0.1", server.port))}
        named = [each.laddr for each in sockets if each.family.name == "AF_UNIX" and each.laddr]
        assert named == []
