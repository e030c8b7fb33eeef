"""The desk between a trial and its workers, without Ray: both sides as coroutines."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from raysv.search.desk import RETRIES, Desk, StoppedError, Task, WorkersError

ONE, OTHER = (Task({"training": {"seed": seed}}, f"/kept/{seed}", threads=1, tests=False) for seed in (1, 2))
SHORT = 0.05  # seconds; long enough for everything that can happen without waiting


def on_a_desk(scene: Callable[[Desk], Awaitable[None]]) -> None:
    async def play() -> None:
        await scene(Desk())

    asyncio.run(play())


async def waits(event: Awaitable[Any]) -> bool:
    """Whether something is still waited for when all has happened that can."""
    try:
        await asyncio.wait_for(event, SHORT)
    except TimeoutError:
        return True
    return False


def test_the_first_worker_begins_a_task_and_the_others_follow() -> None:
    async def scene(desk: Desk) -> None:
        follower = asyncio.create_task(desk.pick_up("group", False, 0))
        await desk.lay_down(ONE)
        assert await waits(asyncio.shield(follower))
        assert await desk.pick_up("group", True, 0) == (1, ONE)
        assert await follower == (1, ONE)

    on_a_desk(scene)


def test_workers_of_a_dead_group_do_not_join_the_next() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        await desk.pick_up("old", True, 0)
        assert await waits(desk.pick_up("new", False, 0))

    on_a_desk(scene)


def test_a_worker_waits_for_the_next_task_when_it_is_done_with_one() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        number, _ = await desk.pick_up("group", True, 0)
        await desk.hand_in(number, None)
        following = asyncio.create_task(desk.pick_up("group", True, number))
        assert await waits(asyncio.shield(following))
        await desk.lay_down(OTHER)
        assert await following == (2, OTHER)

    on_a_desk(scene)


def test_results_arrive_in_order_and_then_nothing() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        for result in ({"epoch": 1}, {"epoch": 2}, None):
            await desk.hand_in(1, result)
        assert [await desk.next_result() for _ in range(3)] == [{"epoch": 1}, {"epoch": 2}, None]

    on_a_desk(scene)


def test_workers_go_on_only_when_the_trial_has_taken_note() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        asked = [asyncio.create_task(desk.may_go_on(1, 1)) for _ in range(2)]
        await desk.hand_in(1, {"epoch": 1})
        assert await waits(asyncio.shield(asked[0]))
        await desk.note(1, 1)
        assert [await answer for answer in asked] == [True, True]
        assert await waits(desk.may_go_on(1, 2))

    on_a_desk(scene)


def test_a_trial_that_ends_sends_its_workers_away() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        asked = asyncio.create_task(desk.may_go_on(1, 1))
        await asyncio.sleep(0)
        await desk.clear(1)
        assert await asked is False
        await desk.hand_in(1, {"epoch": 2})  # of workers that have not heard of it yet
        await desk.lay_down(OTHER)
        assert await desk.may_go_on(1, 1) is False
        assert await waits(desk.next_result())

    on_a_desk(scene)


def test_workers_that_begin_again_may_repeat_what_the_dead_ones_said() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        await desk.pick_up("old", True, 0)
        await desk.hand_in(1, {"epoch": 1})
        await desk.next_result()
        await desk.note(1, 1)
        assert await desk.pick_up("new", True, 0) == (1, ONE)
        await desk.hand_in(1, {"epoch": 1})
        assert await desk.may_go_on(1, 1) is True
        assert await waits(desk.may_go_on(1, 2))

    on_a_desk(scene)


def test_a_task_is_given_up_when_its_workers_died_too_often() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        for turn in range(1 + RETRIES):
            await desk.pick_up(f"group {turn}", True, 0)
            await desk.count_death(f"Worker {turn} died")
        late = asyncio.create_task(desk.pick_up("one more", True, 0))
        with pytest.raises(WorkersError, match=f"Worker {RETRIES} died"):
            await desk.next_result()
        await desk.lay_down(OTHER)
        assert await late == (2, OTHER)

    on_a_desk(scene)


def test_workers_that_die_before_they_come_to_the_desk_count_too() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        for _ in range(1 + RETRIES):
            await desk.count_death("Worker 0 died: NCCL could not start")
        with pytest.raises(WorkersError, match="NCCL could not start"):
            await desk.next_result()

    on_a_desk(scene)


def test_workers_that_die_while_there_is_nothing_to_do_are_not_held_against_the_next_task() -> None:
    async def scene(desk: Desk) -> None:
        ghosts = []  # Ray does not cancel the call of a caller that died
        for turn in range(3):
            ghosts.append(asyncio.create_task(desk.pick_up(f"dead {turn}", True, 0)))
            await asyncio.sleep(0)
            await desk.count_death("Worker 0 died")
        first, other = (asyncio.create_task(desk.pick_up("living", first, 0)) for first in (True, False))
        await asyncio.sleep(0)
        await desk.lay_down(ONE)
        assert [await first, await other] == [(1, ONE), (1, ONE)]
        assert await waits(desk.next_result())
        assert all(isinstance(end, StoppedError) for end in await asyncio.gather(*ghosts, return_exceptions=True))

    on_a_desk(scene)


def test_what_a_worker_said_before_it_gave_up_is_told() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        for turn in range(1 + RETRIES):
            await desk.pick_up(f"group {turn}", True, 0)
            await desk.give_up(1, f"OutOfMemoryError: {turn}", again=True)
            await desk.count_death("Worker 0 died")
        with pytest.raises(WorkersError, match=f"Worker 0 died\nOutOfMemoryError: {RETRIES}"):
            await desk.next_result()

    on_a_desk(scene)


def test_the_end_of_a_trial_that_is_heard_late_does_not_end_the_next() -> None:
    async def scene(desk: Desk) -> None:
        first, second = await desk.lay_down(ONE), await desk.lay_down(OTHER)
        await desk.clear(first)
        await desk.note(first, 1)
        assert await desk.pick_up("group", True, 0) == (second, OTHER)
        assert await waits(desk.may_go_on(second, 1))

    on_a_desk(scene)


def test_a_death_that_is_heard_late_leaves_the_next_task_its_retry() -> None:
    async def scene(desk: Desk) -> None:
        await desk.clear(await desk.lay_down(ONE))
        await desk.lay_down(OTHER)
        await desk.count_death("Worker 0 died, at the end of the task before")
        await desk.count_death("Worker 0 died")
        assert await desk.pick_up("group", True, 0) == (2, OTHER)

    on_a_desk(scene)


def test_followers_take_up_what_their_first_worker_did_even_if_it_has_ended() -> None:
    async def scene(desk: Desk) -> None:
        number = await desk.lay_down(ONE)
        await desk.pick_up("group", True, 0)
        await desk.clear(number)
        await desk.lay_down(OTHER)
        assert await desk.pick_up("group", False, 0) == (number, ONE)
        assert await desk.may_go_on(number, 1) is False

    on_a_desk(scene)


def test_what_would_fail_again_is_not_begun_again() -> None:
    async def scene(desk: Desk) -> None:
        await desk.lay_down(ONE)
        await desk.pick_up("group", True, 0)
        await desk.give_up(1, "ValueError: a batch cannot be formed", again=False)
        with pytest.raises(WorkersError, match="a batch cannot be formed"):
            await desk.next_result()
        assert await waits(desk.pick_up("next", True, 0))

    on_a_desk(scene)
