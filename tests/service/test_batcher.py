"""The batcher: full, partial, cancelled, failing, refused, closed under load."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import service.batcher as batcher_module
from service.batcher import Batched, Batcher
from service.errors import EngineFailure, NotReady, Overloaded


class Engine:
    """Doubles numbers; waits for `gate` first, and notes each batch."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.failure = failure

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.release()
        assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        return [2 * item for item in items]

    async def until_entered(self) -> None:
        await asyncio.to_thread(self.entered.acquire)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def submit(batcher: Batcher[Any, Any], *items: Any) -> list[asyncio.Task[Batched[Any]]]:
    return [asyncio.create_task(batcher.submit(item)) for item in items]


async def opened(
    engine: Any, max_batch: int = 4, max_queue: int = 8, max_wait_ms: float = 0, lanes: int = 1
) -> Batcher[Any, Any]:
    batcher: Batcher[Any, Any] = Batcher(
        engine, ThreadPoolExecutor(lanes), lanes=lanes, max_batch=max_batch, max_queue=max_queue,
        max_wait_ms=max_wait_ms,
    )  # fmt: skip
    batcher.open()
    return batcher


@pytest.fixture
def gathers_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if items never ceased to come in, and no time passed."""
    monkeypatch.setattr(batcher_module, "QUIET_TURNS", 10**9)
    monkeypatch.setattr(batcher_module, "GATHER_S", 10**6)


def test_takes_what_is_waiting_when_the_engine_is_free_and_answers_in_order() -> None:
    async def scenario() -> None:
        engine = Engine()
        batcher = await opened(engine)
        first = submit(batcher, 1)
        await engine.until_entered()
        rest = submit(batcher, 2, 3, 4, 5, 6, 7)
        await asyncio.sleep(0)
        engine.gate.set()
        results = await asyncio.gather(*first, *rest)
        assert [result.value for result in results] == [2, 4, 6, 8, 10, 12, 14]
        assert engine.batches == [[1], [2, 3, 4, 5], [6, 7]]
        assert [result.batch_size for result in results] == [1, 4, 4, 4, 4, 2, 2]
        await batcher.close()

    run(scenario())


def test_what_comes_in_turn_by_turn_of_the_loop_is_one_batch_and_a_lone_item_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batcher_module, "GATHER_S", 60)  # however busy the machine is

    async def scenario() -> None:
        engine = Engine()
        engine.gate.set()
        batcher = await opened(engine)
        tasks = submit(batcher, 1)
        for item in (2, 3):
            await asyncio.sleep(0)
            tasks += submit(batcher, item)
        await asyncio.gather(*tasks)
        assert engine.batches == [[1, 2, 3]]
        (lone,) = await asyncio.gather(*submit(batcher, 4))
        assert (engine.batches[1:], lone.batch_size) == ([[4]], 1)
        await batcher.close()

    run(scenario())


def test_the_engine_begins_though_items_never_cease_to_come_in() -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.gate.set()
        batcher = await opened(engine, max_batch=10**6, max_queue=10**6)
        tasks = []
        while not engine.batches:
            tasks += submit(batcher, len(tasks))
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks)
        assert results[0].queue_ms >= 1000 * batcher_module.GATHER_S
        await batcher.close()

    run(scenario())


def test_as_many_as_a_lane_can_take_begin_at_once(gathers_for_ever: None) -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.gate.set()
        batcher = await opened(engine, max_batch=4)
        await asyncio.gather(*submit(batcher, 1, 2, 3, 4))
        assert engine.batches == [[1, 2, 3, 4]]
        await batcher.close()

    run(scenario())


def test_closing_ends_the_gathering(gathers_for_ever: None) -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.gate.set()
        batcher = await opened(engine)
        tasks = submit(batcher, 1, 2)
        await asyncio.sleep(0)
        await batcher.close()
        assert [result.value for result in await asyncio.gather(*tasks)] == [2, 4]

    run(scenario())


def test_waits_for_company_up_to_max_wait_and_not_when_full() -> None:
    async def scenario() -> None:
        engine = Engine()
        engine.gate.set()
        batcher = await opened(engine, max_batch=2, max_wait_ms=60_000)
        assert [r.value for r in await asyncio.gather(*submit(batcher, 1, 2))] == [2, 4]
        assert engine.batches == [[1, 2]]
        await batcher.close()
        short = await opened(engine, max_batch=2, max_wait_ms=20)
        assert (await short.submit(3)).value == 6
        await short.close()

    run(scenario())


def test_a_lane_that_ends_by_a_fault_of_ours_is_told_and_closing_does_not_fail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        lost = asyncio.Event()
        with ThreadPoolExecutor(1) as threads:
            batcher = Batcher(list, threads, max_batch=2, max_queue=9, max_wait_ms=1e300, on_lost=lost.set)
            batcher.open()
            (waits,) = submit(batcher, 1)  # for longer than a condition can wait: OverflowError in the lane
            await asyncio.wait_for(lost.wait(), 10)
            waits.cancel()
            await batcher.close()

    run(scenario())
    assert "a lane of the engine ended" in caplog.text and "OverflowError" in caplog.text


def test_refuses_at_once_when_the_queue_is_full() -> None:
    async def scenario() -> None:
        engine = Engine()
        batcher = await opened(engine, max_batch=1, max_queue=2)
        under_way = submit(batcher, 1)
        await engine.until_entered()
        waiting = submit(batcher, 2, 3)
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 places"):
            await batcher.submit(4)
        engine.gate.set()
        assert [r.value for r in await asyncio.gather(*under_way, *waiting)] == [2, 4, 6]
        await batcher.close()

    run(scenario())


def test_a_cancelled_item_never_reaches_the_engine_and_frees_its_place() -> None:
    async def scenario() -> None:
        engine = Engine()
        batcher = await opened(engine, max_batch=4, max_queue=2)
        under_way = submit(batcher, 1)
        await engine.until_entered()
        gone, stays = submit(batcher, 2, 3)
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        late = submit(batcher, 4)
        await asyncio.sleep(0)
        engine.gate.set()
        assert [r.value for r in await asyncio.gather(*under_way, stays, *late)] == [2, 6, 8]
        assert engine.batches == [[1], [3, 4]]
        await batcher.close()

    run(scenario())


def test_images_can_be_cancelled_too_though_they_have_no_equality() -> None:
    async def scenario() -> None:
        gate = threading.Event()

        def shapes(images: list[np.ndarray]) -> list[tuple[int, ...]]:
            assert gate.wait(30)
            return [image.shape for image in images]

        batcher = await opened(shapes)
        first = submit(batcher, np.zeros((8, 8, 3), np.uint8))
        await asyncio.sleep(0.1)
        stays, gone = submit(batcher, *np.zeros((2, 8, 8, 3), np.uint8))
        await asyncio.sleep(0)
        gone.cancel()
        assert isinstance((await asyncio.gather(gone, return_exceptions=True))[0], asyncio.CancelledError)
        gate.set()
        assert [r.value for r in await asyncio.gather(*first, stays)] == [(8, 8, 3)] * 2
        await batcher.close()

    run(scenario())


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), None])
def test_a_failing_or_miscounting_engine_reaches_every_item_of_its_batch_and_only_those(
    failure: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        engine = Engine(failure)
        run_batch = engine if failure else (lambda items: engine(items)[:-1])
        batcher = await opened(run_batch, max_batch=3)
        first = submit(batcher, 0)
        await engine.until_entered()  # so that the next three are together
        items = submit(batcher, 1, 2, 3)
        engine.gate.set()
        results = await asyncio.gather(*items, return_exceptions=True)
        await asyncio.gather(*first, return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailure] * 3
        assert "out of memory" not in str(results[0])
        engine.failure = None
        if failure:
            assert (await batcher.submit(4)).value == 8
        await batcher.close()

    run(scenario())
    assert "the engine failed on a batch of 3" in caplog.text


def test_closing_under_load_answers_what_waits_and_refuses_what_comes() -> None:
    async def scenario() -> None:
        engine = Engine()
        batcher = await opened(engine, max_batch=2)
        items = submit(batcher, 1, 2, 3, 4, 5)
        await engine.until_entered()
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await batcher.submit(6)
        engine.gate.set()
        await closing
        assert [task.result().value for task in items] == [2, 4, 6, 8, 10]

    run(scenario())


def test_a_storm_of_cancellations_and_failures_leaves_nobody_waiting() -> None:
    async def scenario() -> None:
        def sometimes(items: list[int]) -> list[int]:
            if any(item % 13 == 0 for item in items):
                raise ValueError("unlucky")
            return [2 * item for item in items]

        batcher = await opened(sometimes, max_batch=5, max_queue=1000)
        tasks = submit(batcher, *range(1, 500))
        await asyncio.sleep(0)
        for task in tasks[::7]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for item, result in enumerate(results, 1):
            assert isinstance(result, EngineFailure | asyncio.CancelledError) or result.value == 2 * item  # type: ignore[union-attr]
        assert (await batcher.submit(1)).value == 2
        await batcher.close()

    run(scenario())


def test_lanes_work_side_by_side_and_share_what_waits() -> None:
    async def scenario() -> None:
        engine = Engine()
        batcher = await opened(engine, max_batch=8, lanes=2)
        first = submit(batcher, 1)
        await engine.until_entered()
        second = submit(batcher, 2)
        await engine.until_entered()  # while the first is under way
        rest = submit(batcher, *range(3, 9))
        await asyncio.sleep(0.01)
        engine.gate.set()
        assert [batched.value for batched in await asyncio.gather(*first, *second, *rest)] == [*range(2, 18, 2)]
        assert engine.batches[:2] == [[1], [2]]
        await batcher.close()

    run(scenario())


def test_many_items_through_many_lanes_get_their_own_results() -> None:
    async def scenario() -> None:
        batcher = await opened(lambda items: [2 * item for item in items], max_queue=5000, lanes=4)
        results = await asyncio.gather(*submit(batcher, *range(3000)))
        assert [batched.value for batched in results] == [*range(0, 6000, 2)]
        await batcher.close()

    run(scenario())
