"""The serving bench without a server: tables and bars from given rounds, subjects, generated pictures, pauses."""

import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service.engines.choose import Layout, create
from service.model.artifact import open_artifact
from service.model.images import decode
from tests.bench import inputs, limit, pauses, report, service_profile, serving, subjects
from tests.bench.peers.catalogue import MODELS, PEERS, base64_row, form
from tests.bench.processes import NotStarted, Server
from tests.bench.table import RESULTS

CONCURRENCY = [1, 32]


def served(name: str, kind: str, model: str, number: int, rate: float, p50_ms: float, **more: Any) -> dict[str, Any]:
    entry = {"p99_ms": 2 * p50_ms, "errors": {}, "n": 10, "first_error": "", "client_us": 20.0}
    loads = {
        "1": {"throughput": rate / 2, "p50_ms": p50_ms, **entry},
        "32": {"throughput": rate, "p50_ms": 50, **entry},
    }
    return {
        "side": 32, "round": number, "name": name, "kind": kind, "model": model, "peer": name.split(",")[0],
        "workers": 1, "load": loads, "memory": {"pss": 100.0, "rss": 150.0, "processes": 2}, "startup_s": 1.5,
        "first_answer_s": 2.0, "answer": "", **more,
    }  # fmt: skip


def rounds() -> list[dict[str, Any]]:
    records = []
    for number, rate in enumerate((900.0, 1000.0, 1200.0), start=1):
        records += [
            served("this service, openvino-int8", "ours", "openvino-int8", number, rate, 3.0),
            served("fastapi, torch", "peer", "torch", number, 100, 30.0),
            served("litserve, torch", "peer", "torch", number, 200, 20.0),
            served("litserve, openvino-int8", "peer", "openvino-int8", number, 500, 5.0),
            {
                "side": 32, "round": number, "name": "in process, openvino-int8", "kind": "limit", "peer": "",
                "model": "openvino-int8", "workers": 1, "throughput": 1250.0, "way": "throughput mode", "n": 99,
                "p50_ms": 2.0 + number / 10, "ways": {},
            },
        ]  # fmt: skip
    skipped = {"name": "torchserve, torch", "kind": "peer", "model": "torch", "peer": "torchserve", "workers": 1}
    return [*records, {"side": 32, "round": 1, **skipped, "skipped": "needs java"}]


def run_data(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": "2026-11-22", "machine": "2 cores", "inputs": {"32": "drawn"}, "sides": [32], "rounds": 3, "seed": 34,
        "concurrency": CONCURRENCY, "seconds": 6.0, "warmup_s": 2.0, "records": records,
        "versions": {"litserve": "0.2.19"},
    }  # fmt: skip


def test_figures_are_medians_over_rounds() -> None:
    found = report.figures(rounds(), 32, CONCURRENCY)
    ours = found["this service, openvino-int8"]
    assert (ours.throughput, ours.p50_ms[1], ours.n, ours.pss) == ({1: 500, 32: 1000}, 3.0, 60, 100.0)
    assert found["in process, openvino-int8"].p50_ms[1] == pytest.approx(2.2)
    assert "torchserve, torch" not in found
    assert report.figures(rounds(), 224, CONCURRENCY) == {}


def test_bars_compare_with_the_best_peer_and_the_limit_of_the_same_engine() -> None:
    lines = {
        what: (other, value)
        for what, other, value in report.bars(report.figures(rounds(), 32, CONCURRENCY), CONCURRENCY)
    }
    assert lines["openvino-int8 / best peer as documented (torch)"] == ("litserve, torch", "5.00 (4.50 to 6.00)")
    same = lines["openvino-int8 / best peer with the int8 file"]
    assert same == ("litserve, openvino-int8", "2.00 (1.80 to 2.40)")
    assert lines["openvino-int8 / in process, same engine"] == ("throughput mode", "0.80 (0.72 to 0.96)")
    assert lines["openvino-int8: p50 at 1 minus in process"] == ("one image", "0.80 ms (0.70 to 0.90)")


def test_a_round_that_one_of_two_missed_is_no_ratio() -> None:
    records = [one for one in rounds() if not (one["round"] == 3 and one["kind"] == "ours")]
    _, _, value = report.bars(report.figures(records, 32, CONCURRENCY), CONCURRENCY)[0]
    assert value == "4.75 (4.50 to 5.00)"


def test_the_page_names_what_was_skipped_what_failed_and_errors(tmp_path: Path) -> None:
    broken = served("this service, torch", "ours", "torch", 1, 10, 9.0)
    broken["load"]["32"] |= {"errors": {"status 500": 7}, "first_error": "status 500: oh"}
    failed = {
        **served("this service, openvino-bf16", "ours", "openvino-bf16", 1, 0, 0),
        "failed": "ended with status 1",
    }
    del failed["load"]
    folder = tmp_path / "results"
    folder.mkdir()
    report.write(run_data([*rounds(), broken, failed]), folder)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "- torchserve, torch skipped (round 1): needs java" in page
    assert "**this service, torch had errors** (round 1, at 32): {'status 500': 7}, the first: status 500: oh" in page
    assert "**this service, openvino-bf16 failed** (round 1): ended with status 1" in page
    assert "| litserve, torch | 0.2.19 | 100 | 200 |" in page
    assert "in process, openvino-int8 (throughput mode)" in page
    assert "openvino-int8 / best peer as documented (torch) | litserve, torch | 5.00" in page
    with Image.open(folder / "serving.png") as picture:
        assert picture.width > 500


def test_the_report_can_be_written_again_from_the_raw_rounds(tmp_path: Path) -> None:
    raw = tmp_path / "results" / "serving.json"
    raw.parent.mkdir()
    raw.write_text(json.dumps(run_data(rounds())))
    assert serving.main(["--report-only", "--raw", str(raw)]) == 0
    assert (tmp_path / "RESULTS.md").is_file()


def test_failures_of_our_own_are_told() -> None:
    good = served("this service, torch", "ours", "torch", 1, 10, 9.0)
    assert serving.failure(good) == ""
    good["load"]["1"] |= {"errors": {"closed": 1}, "first_error": "closed:"}
    assert "closed" in serving.failure(good)
    assert serving.failure({"failed": "no model"}) == "no model"


def test_every_round_shuffles_all_subjects_and_what_is_skipped_has_no_further_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = subjects.subjects(["litserve", "fastapi"], ["torch"], {})
    result = {"throughput": 1.0, "way": "", "p50_ms": 1.0, "n": 1}
    monkeypatch.setattr(
        serving, "measure", lambda subject, _: {"skipped": "no"} if subject.peer == "litserve" else result
    )
    names = [record["name"] for record in serving.rounds({32: every}, {32: None}, 3)]  # type: ignore[dict-item]
    assert sorted(names[: len(every)]) == sorted(subject.name for subject in every)
    assert names.count("litserve, torch") == 1
    assert names.count("fastapi, torch") == 3


def test_a_peer_keeps_the_number_of_workers_that_answers_most(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(subject: subjects.Subject, setting: subjects.Setting) -> dict[str, Any]:
        assert setting.concurrency == (32,)
        if subject.model == "torch" and subject.workers == 1:
            return {"skipped": "no"}
        return {"load": {"32": {"throughput": 100.0 / subject.workers}}}

    monkeypatch.setattr(serving, "measure", measure)
    setting = subjects.Setting(32, tmp_path, tmp_path, (1, 32), 6.0, [])
    chosen, tried = serving.tune(["litserve"], setting, [1, 2], {})
    assert chosen == {("litserve", "torch"): 2, ("litserve", "openvino-int8"): 1}
    assert tried["litserve, openvino-int8"] == {"1": 100.0, "2": 50.0}
    assert serving.tune(["litserve"], setting, [2], {})[0]["litserve", "torch"] == 2
    assert subjects.subjects(["litserve"], [], chosen)[1].name == "litserve, torch, 2 workers"


def test_every_peer_has_both_models_and_pinned_requirements() -> None:
    chosen = subjects.subjects(list(PEERS), ["torch"], {})
    assert {(one.peer, one.model) for one in chosen if one.kind == "peer"} == {(p, m) for p in PEERS for m in MODELS}
    for peer in PEERS.values():
        lines = peer.requirements.read_text().split()
        assert all("==" in line for line in lines), peer.name
        assert peer.version in "".join(lines)
        assert {"torch==2.13.0", "torchvision==0.28.0"} <= set(lines)


def test_models_of_an_older_format_are_made_again(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "side32"
    made: list[list[str]] = []

    def make(command: list[str], **_: Any) -> None:
        made.append(command)
        shutil.copytree(artifact, folder / "artifact")
        (folder / "facts.json").write_text("{}")

    monkeypatch.setattr(subjects.subprocess, "run", make)
    assert subjects.models(32, tmp_path) == subjects.models(32, tmp_path) == folder
    assert len(made) == 1
    monkeypatch.setattr(subjects, "FORMAT_VERSION", subjects.FORMAT_VERSION + 1)
    subjects.models(32, tmp_path)
    (folder / "artifact" / "manifest.json").write_text('{"format_version": 1}')
    subjects.models(32, tmp_path)
    assert len(made) == 3


def test_the_page_names_the_commit_and_what_a_gpu_loses_to_its_graph(tmp_path: Path) -> None:
    forward = {"forward": {"infer": 9000.0, "bare_graph": 10000.0}}
    records = [one | forward if one["kind"] == "limit" else one for one in rounds()]
    (tmp_path / "results").mkdir()
    report.write({**run_data(records), "commit": "abc1234"}, tmp_path / "results")
    page = (tmp_path / "RESULTS.md").read_text()
    assert "2026-11-22, commit abc1234, 2 cores." in page
    assert "(results/serving-limits.md)" in page
    assert (RESULTS / "serving-limits.md").is_file()
    assert "| openvino-int8: batches of 32 decoded already / the bare CUDA graph | one round | 0.90 |" in page
    what = "openvino-int8: what binds | decoding and resizing, on the processor"
    assert f"| {what} | 1000/s served, 1250 in process, 9000 decoded already |" in page


@pytest.mark.parametrize(
    ("served", "in_process", "forward", "expected"),
    [(850, 900, 1000, "the GPU"), (850, 900, 9000, "decoding and resizing, on the processor"),
     (300, 900, 9000, "HTTP and batching, on the processor"), (300, 900, 1000, "HTTP and batching, on the processor")],
)  # fmt: skip
def test_what_holds_a_gpu_up_is_named(served: float, in_process: float, forward: float, expected: str) -> None:
    assert report.bottleneck(served, in_process, forward)[0] == expected


def test_on_a_gpu_batches_of_32_reach_four_fifths_of_the_bare_graph(tmp_path: Path) -> None:
    """At 224 px, where a batch computes long enough for its copies to be small beside it."""
    if not torch.cuda.is_available():
        pytest.skip("There is no GPU on this machine.")
    engine = create(open_artifact(subjects.models(224, tmp_path) / "artifact"), "torch-cuda", Layout(1))
    forward = limit.cuda_forward(engine, 224, 2.0)
    assert forward["infer"] >= 0.8 * forward["bare_graph"], forward


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_round_measures_our_service_its_limit_and_the_empty_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For half a second, without peers: that everything runs and is told, not how fast."""
    monkeypatch.setattr(serving.signal, "signal", lambda *_: None)  # the tests keep their own
    raw = tmp_path / "results" / "serving.json"
    flags = ["--sides", "32", "--peers", "", "--engines", "openvino-int8", "--rounds", "1", "--seconds", "0.5"]
    assert serving.main([*flags, "--concurrency", "1,2", "--cache", str(tmp_path / "cache"), "--raw", str(raw)]) == 0
    data = json.loads(raw.read_text())
    found = {record["name"]: record for record in data["records"]}
    assert set(found) == {"this service, openvino-int8", "in process, openvino-int8", "empty route"}
    assert not [record for record in found.values() if "failed" in record or "skipped" in record]
    for name in ("this service, openvino-int8", "empty route"):
        for entry in found[name]["load"].values():
            assert entry["n"] > 0 and entry["throughput"] > 0 and not entry["errors"], entry
        assert found[name]["memory"]["pss"] > 0 and found[name]["startup_s"] > 0
    answer = json.loads(found["this service, openvino-int8"]["answer"].partition('"predictions"')[0] + '"": 0}')
    assert answer["model"]["name"] == "resnet34-bench"
    in_process = found["in process, openvino-int8"]
    assert in_process["throughput"] > 0 and in_process["p50_ms"] > 0 and len(in_process["ways"]) == 3
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| openvino-int8 / in process, same engine |" in page
    assert "| this service, openvino-int8 |" in page


@pytest.mark.parametrize(("gpus", "measured"), [(0, False), (2, True)])
def test_the_engine_for_gpus_is_measured_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: int, measured: bool
) -> None:
    monkeypatch.setattr(limit, "gpus", lambda: gpus)
    chosen = serving.parse([]).engines
    assert ("torch-cuda" in chosen) == measured
    names = [subject.name for subject in subjects.subjects([], chosen, {})]
    assert ("in process, torch-cuda" in names) == ("this service, torch-cuda" in names) == measured
    assert "this service, openvino-int8" in names
    if not measured:
        with pytest.raises(SystemExit):
            serving.parse(["--engines", "torch-cuda"])
        assert "unknown: torch-cuda; known are torch, openvino-fp32" in capsys.readouterr().err


def test_requests_carry_the_file() -> None:
    body, kind = form("images")(b"JPEG")
    edge = kind.partition("boundary=")[2].encode()
    assert body.split(b"\r\n\r\n")[1].startswith(b"JPEG\r\n--" + edge)
    assert b'name="images"; filename=' in body
    rows = json.loads(base64_row(b"JPEG")[0])["dataframe_split"]["data"]
    assert rows == [["SlBFRw=="]]


def test_drawn_pictures_are_photographs_to_a_decoder() -> None:
    files = [inputs.photo(seed) for seed in range(3)]
    for file in files:
        image = decode(file)
        assert 250 < min(image.shape[:2]) < max(image.shape[:2]) < 700
        assert image.std() > 20
        assert 0.5 < 8 * len(file) / (image.shape[0] * image.shape[1]) < 6  # bits a pixel, as of photographs
    assert len(set(files)) == 3
    assert inputs.photo(1) == files[1]
    with Image.open(io.BytesIO(inputs.drawn(0, 32, 32))) as small:
        assert (small.size, small.format) == ((32, 32), "JPEG")


def test_noise_falls_as_one_over_the_frequency() -> None:
    spectrum = np.abs(np.fft.rfft2(inputs._pink(np.random.default_rng(0), 256, 256)))[1:64, 1:64]
    low, high = spectrum[3:6, 3:6].mean(), spectrum[30:60, 30:60].mean()
    assert low / high == pytest.approx(10, rel=0.3)


SERVER = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_server_is_started_weighed_and_stopped_with_all_its_processes(tmp_path: Path) -> None:
    port = subjects.free_ports()
    command = [sys.executable, "-c", SERVER, str(port)]
    server = Server(command, {}, f"http://127.0.0.1:{port}/", tmp_path / "log", tmp_path).start(20)
    try:
        memory = server.memory()
        assert memory.processes == 2
        assert 5 < memory.pss <= memory.rss < 500
        assert server.startup_s > 0
    finally:
        server.stop(grace_s=1)
    assert server.pids() == []


def test_a_server_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no model here')"]
    with pytest.raises(NotStarted, match=r"ended with status 1; its log ends: no model here"):
        Server(command, {}, "http://127.0.0.1:9/", tmp_path / "log").start(20)


def test_what_a_standstill_interrupts_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "PAUSE_S", 0.1)
    calls: list[int] = []

    def what() -> int:
        calls.append(1)
        if len(calls) == 1:
            monkeypatch.setattr(pauses, "TICK_S", 0.2)  # the watch wakes late, as after a pause
            time.sleep(0.4)
            monkeypatch.setattr(pauses, "TICK_S", 0.01)
            raise TimeoutError
        return len(calls)

    assert pauses.undisturbed(what) == 2


def test_an_error_without_a_standstill_is_handed_on() -> None:
    with pytest.raises(ValueError, match="mine"):
        pauses.undisturbed(lambda: (_ for _ in ()).throw(ValueError("mine")))


def test_a_profile_counts_lines_by_themselves_and_with_what_they_call() -> None:
    text = service_profile._summary("main (a.py:1);work (b.py:2) 3\nmain (a.py:4);work (b.py:2);deep (c.py:9) 1\n", 2)
    assert "4 of 800 samples" in text
    assert "self  75.0%  work (b.py:2)\n" in text and "self  25.0%  deep (c.py:9)\n" in text
    assert "cum  100.0%  main (a.py)\n" in text and "cum   25.0%  deep (c.py)\n" in text
