"""SageMaker's endpoints as targets: which refusal is the image's, which is worth another try, what stays in S3.

The data plane is a small server that says what AWS says; S3 is the rehearsal's.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_client import GOOD, Waits, answering, problem
from tests.rehearsal.start import REGION, Rehearsal
from training.launch import client
from training.launch.client import AsyncTarget, EndpointTarget, Unanswered, classify, classify_one
from training.launch.errors import AwsError, LaunchError
from training.launch.session import Aws, connect

BUCKET = "asked"
LARGE = b"x" * (5 * 2**20)

Answer = tuple[int, dict[str, str], object]


def refusal(status: int, code: str, message: str, **more: object) -> Answer:
    return status, {"x-amzn-errortype": code}, {"message": message, **more}


@pytest.fixture
def account_with(monkeypatch: pytest.MonkeyPatch, cloud: Rehearsal) -> Callable[[str], Aws]:
    """An account of the rehearsal whose endpoints are at another address."""

    def made(runtime: str) -> Aws:
        for name, value in cloud.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", runtime)
        return connect(REGION)

    return made


@pytest.fixture
def bucket(cloud: Rehearsal) -> Iterator[Callable[[], list[str]]]:
    """A bucket for images; its keys."""
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})

    def keys() -> list[str]:
        return [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET).get("Contents", ())]

    yield keys
    for key in keys():
        s3.delete_object(Bucket=BUCKET, Key=key)
    s3.delete_bucket(Bucket=BUCKET)


@pytest.mark.parametrize(
    ("body", "message", "status"),
    [
        (LARGE, "1 validation error detected: the body has more than 4194304 bytes.", 413),
        (LARGE, "Endpoint mine of account 123456789012 not found.", None),
        (b"x", "Endpoint mine is asynchronous: use InvokeEndpointAsync.", None),
    ],
)
def test_only_an_image_that_is_too_large_is_the_images_fault(
    account_with: Callable[[str], Aws], body: bytes, message: str, status: int | None
) -> None:
    with answering(refusal(400, "ValidationError", message)) as (url, times):
        target = EndpointTarget(account_with(url), "mine")
        if status is None:
            with pytest.raises(LaunchError, match=rf"{message}|There is no endpoint mine in {REGION}: `deploy` first"):
                target.ask(body, "image/png")
        else:
            reply = target.ask(body, "image/png")
            assert reply.status == status and message in reply.problem and "5.2 MB" in reply.problem
    assert len(times) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [(530, "InternalDependencyException"), (503, "ServiceUnavailable"), (429, "ThrottlingException")],
)
def test_what_aws_may_do_better_later_is_asked_once_a_try(
    account_with: Callable[[str], Aws], status: int, code: str
) -> None:
    with answering(refusal(status, code, "later")) as (url, times):
        with pytest.raises(Unanswered, match="later"):
            EndpointTarget(account_with(url), "mine").ask(b"image", "image/png")
        assert len(times) == 1  # botocore's own tries would make 36 of 6


def test_the_containers_own_error_is_its_answer(account_with: Callable[[str], Aws], tmp_path: Path) -> None:
    said = json.dumps(problem("unreadable_image"))
    (tmp_path / "a.png").write_bytes(b"no image")
    wrapped = refusal(424, "ModelError", "wrapped", OriginalStatusCode=400, OriginalMessage=said)
    with answering(wrapped) as (url, _):
        outcome = classify_one(EndpointTarget(account_with(url), "mine"), tmp_path / "a.png")
    assert outcome.problem == "unreadable_image: a sentence"


def test_a_container_that_says_later_is_asked_again_after_what_it_says(
    account_with: Callable[[str], Aws], tmp_path: Path
) -> None:
    """SageMaker hands on the container's status and body, wrapped, and no header."""
    (tmp_path / "a.png").write_bytes(b"image")
    said, stop = json.dumps(problem("overloaded", retry_after_s=4)), Waits()
    busy = refusal(424, "ModelError", "wrapped", OriginalStatusCode=503, OriginalMessage=said)
    with answering(busy, (200, {}, GOOD)) as (url, times):
        outcome = classify_one(EndpointTarget(account_with(url), "mine"), tmp_path / "a.png", stop=stop)
    assert (outcome.problem, outcome.tries, len(times)) == (None, 2, 2)
    assert stop.asked_s == [4]


def asynchronous(aws: Aws, **more: Any) -> AsyncTarget:
    return AsyncTarget(aws, "mine", f"s3://{BUCKET}/input", poll_s=0.05, **more)


def accepted() -> Answer:
    places = {name: f"s3://{BUCKET}/{name}" for name in ("output", "failed")}
    return 202, {
        "X-Amzn-SageMaker-OutputLocation": places["output"], "X-Amzn-SageMaker-FailureLocation": places["failed"]
    }, {"InferenceId": "1"}  # fmt: skip


@pytest.mark.parametrize(("key", "status"), [("output", 200), ("failed", 500)])
def test_an_asynchronous_answer_is_taken_and_nothing_stays(
    account_with: Callable[[str], Aws], cloud: Rehearsal, bucket: Callable[[], list[str]], key: str, status: int
) -> None:
    with answering(accepted()) as (url, _):
        aws, given = account_with(url), list[dict[str, Any]]()
        aws.client("sagemaker-runtime").meta.events.register(
            "provide-client-params.*.InvokeEndpointAsync", lambda params, **_: given.append(params)
        )
        target = asynchronous(aws)
        later = threading.Timer(0.3, cloud.client("s3").put_object, (), {"Bucket": BUCKET, "Key": key, "Body": b"said"})
        later.start()
        reply = target.ask(b"image", "image/png")
        later.join()
    assert (reply.status, reply.body) == (status, b"said")
    assert [each["InvocationTimeoutSeconds"] for each in given] == [3600]
    assert bucket() == []


def test_an_asynchronous_answer_that_never_comes_is_that_images_problem(
    account_with: Callable[[str], Aws], bucket: Callable[[], list[str]]
) -> None:
    with answering(accepted()) as (url, _):
        reply = asynchronous(account_with(url), limit_s=0.3).ask(b"image", "image/png")
    assert reply.status not in (200, *client.LATER)
    assert "no answer at s3://asked/output within 0.3 s" in reply.problem
    assert bucket() == []


def test_an_asynchronous_request_that_is_refused_leaves_no_image(
    account_with: Callable[[str], Aws], bucket: Callable[[], list[str]]
) -> None:
    for code, raised in (("ThrottlingException", Unanswered), ("ValidationError", AwsError)):
        with answering(refusal(400, code, "no")) as (url, _), pytest.raises(raised):
            asynchronous(account_with(url)).ask(b"image", "image/png")
        assert bucket() == []


def test_who_stops_reading_waits_for_no_further_tries(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.write_bytes(b"image")
    with answering((200, {}, GOOD), (503, {"Retry-After": "15"}, problem("overloaded"))) as (url, times):
        with closing(client.UrlTarget(url)) as target:
            outcomes = classify(target, paths, concurrency=1)
            assert next(outcomes).problem is None
            while len(times) < 2:
                time.sleep(0.01)
            start_s = time.monotonic()
            outcomes.close()  # type: ignore[attr-defined]
            assert time.monotonic() - start_s < 14
        assert len(times) == 2


def test_an_answer_of_some_other_service_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"image")
    with answering((200, {}, {"hello": 1})) as (url, _), closing(client.UrlTarget(url)) as target:
        outcome = classify_one(target, tmp_path / "a.png")
    assert outcome.problem and "none of this service" in outcome.problem
