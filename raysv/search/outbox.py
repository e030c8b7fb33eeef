"""Entries for a service that may be out for a while, without the study noticing."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable

from raysv.search.wording import first_line

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0  # between attempts while MLflow does not answer,
RETRY_SHARE = 10.0  # or so many times what the last one took: an attempt holds the study up, for a minute if need be
LAST_PAUSES, PATIENT = (0.0, 1.0, 3.0, 10.0, 20.0, 30.0), 3  # seconds, at the end; of which so many are worth a word
ATTEMPTS = 3  # at an entry that MLflow refuses although it answers


class Outbox:
    """Entries for MLflow, made in the order in which they came; nothing they raise gets out.

    An entry that fails stays first and is tried again with a later one, so entries must bear being made twice. Only one
    that fails again and again while MLflow answers is given up: then the entry is at fault.

    Args:
        recover: called after an entry failed, before it is tried again; raises when MLflow does not answer.
    """

    def __init__(self, recover: Callable[[], object]) -> None:
        self._recover = recover
        self._waiting: deque[Callable[[], object]] = deque()
        self._attempts = 0
        self._resume_at = -math.inf
        self._lost = 0
        self._told: set[str] = set()

    def put(self, entry: Callable[[], object]) -> None:
        """Make an entry now, or as soon as it goes."""
        self._waiting.append(entry)
        if time.monotonic() >= self._resume_at:
            self._work()

    def empty(self) -> None:
        """Make a last effort for all that waits, and say what could not be written."""
        for number, pause in enumerate(LAST_PAUSES):
            if number and self._waiting and number == len(LAST_PAUSES) - PATIENT:
                logger.warning("MLflow does not answer. Waiting %d s for it.", sum(LAST_PAUSES[number:]))
            time.sleep(pause if self._waiting else 0.0)
            self._work()
        lost = self._lost + len(self._waiting)
        if lost:
            logger.warning(
                "%d entries could not be written to MLflow. Tune's own results and the checkpoints are complete; once "
                "MLflow answers, --resume of the study writes what is missing.",
                lost,
            )

    def _work(self) -> None:
        while self._waiting:
            started = time.monotonic()
            try:
                self._waiting[0]()
            except Exception as error:  # whatever is wrong with MLflow, a study of days must not end by it
                keep, now = self._keep(error), time.monotonic()
                self._resume_at = now + max(RETRY_SECONDS, RETRY_SHARE * (now - started))
                if keep:
                    return
                self._lost += 1
            self._waiting.popleft()
            self._attempts = 0

    def _keep(self, error: Exception) -> bool:
        """Whether an entry that failed is worth another attempt, later."""
        kind = type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("MLflow: %s: %s. The study goes on.", kind, first_line(error)[:200])
        try:
            self._recover()
        except Exception:  # no answer: the entry need not be at fault
            self._attempts = 0
        else:
            self._attempts += 1
        return self._attempts < ATTEMPTS
