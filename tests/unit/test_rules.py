"""The rules: pure functions, so every case can be listed.

No process, no database.
"""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import product

import pytest

from dbpool_executor._dispatch.pace import (
    START_ATTEMPTS,
    are_starts_given_up,
    delay_before_repeat,
    delay_before_start,
    group_size,
    is_taken_back,
    jobs_to_send,
    moving_average,
    seconds_to_nap,
    seconds_until_due,
    share_of_each,
    updated_estimate,
    workers_to_start,
)
from dbpool_executor._dispatch.verdict import (
    Death,
    death_of,
    error_at_end,
    lost_result_error,
    may_repeat,
    never_sent_error,
    outcome_at_end,
    resolved_error,
)
from dbpool_executor._wire.options import DEFAULTS
from dbpool_executor._wire.phase import WORDS, Phase, PhaseRecord, Progress
from dbpool_executor.errors import (
    DBPoolError,
    JobTimeoutError,
    Outcome,
    OutcomeUnknownError,
    ResultLostError,
    WorkerDiedError,
)


@pytest.mark.parametrize(
    ("waiting", "idle", "starting", "alive", "max_workers", "started"),
    [
        (0, 0, 0, 0, 4, 0),  # nothing to do
        (1, 0, 0, 0, 4, 1),  # the first job
        (3, 0, 0, 0, 4, 3),  # a worker for each
        (9, 0, 0, 0, 4, 4),  # as many as there may be
        (1, 1, 0, 1, 4, 0),  # an idle worker is used before a new one
        (1, 0, 1, 1, 4, 0),  # and so is one that starts
        (2, 1, 0, 1, 4, 1),
        (3, 1, 1, 3, 4, 1),  # one of three is busy
        (3, 0, 0, 4, 4, 0),  # full: all are busy
        (3, 0, 0, 3, 4, 1),
        (1, 0, 0, 5, 4, 0),  # above the bound, never below nothing
        (0, 3, 1, 4, 4, 0),
    ],
)
def test_number_of_workers_to_start(
    waiting: int, idle: int, starting: int, alive: int, max_workers: int, started: int
) -> None:
    """Each row is one situation and the number of workers that it calls for."""
    assert started == workers_to_start(
        waiting=waiting,
        idle=idle,
        starting=starting,
        alive=alive,
        max_workers=max_workers,
    )


def test_no_situation_starts_too_many_workers_or_too_few() -> None:
    """In every small situation the number is the only one that keeps the rule."""
    for waiting, idle, starting, busy, max_workers in product(
        range(7), range(4), range(4), range(4), range(1, 6)
    ):
        alive = idle + starting + busy
        started = workers_to_start(
            waiting=waiting,
            idle=idle,
            starting=starting,
            alive=alive,
            max_workers=max_workers,
        )
        free = idle + starting + started
        assert started >= 0
        assert not started or alive + started <= max_workers
        assert not started or free <= waiting
        assert free >= waiting or alive + started >= max_workers


@pytest.mark.parametrize(
    ("tries", "delay"),
    [
        (1, 0.1),
        (2, 0.2),
        (3, 0.4),
        (4, 0.8),
        (5, 1.6),
        (6, 3.2),
        (7, 5.0),
        (8, 5.0),
        (1000, 5.0),
        (10**9, 5.0),
    ],
)
def test_failed_starts_are_tried_again_ever_later(tries: int, delay: float) -> None:
    """The delay doubles up to five seconds; the last try is when the patience ends."""
    assert delay_before_start(tries) == pytest.approx(delay)
    assert delay_before_start(tries, 0.3) == pytest.approx(min(delay, 0.3))
    assert delay_before_start(tries, -1.0) == pytest.approx(delay)


@pytest.mark.parametrize(
    ("lasting", "passing", "seconds", "able", "is_given_up"),
    [
        # What will not pass: three, whenever they come.
        (1, 0, 0.0, 0, False),
        (2, 0, 400.0, 0, False),
        (3, 0, 0.3, 0, True),
        (9, 0, 0.3, 0, True),
        # What may pass does not count as long as there is patience.
        (0, 3, 1.0, 0, False),
        (0, 500, 299.9, 0, False),
        (2, 500, 299.9, 0, False),
        (3, 500, 1.0, 0, True),
        # And counts after that.
        (0, 2, 300.0, 0, False),
        (0, 3, 300.0, 0, True),
        (1, 2, 300.0, 0, True),
        # A worker that is ready keeps it going.
        (3, 0, 0.3, 1, False),
        (50, 500, 9000.0, 1, False),
        (50, 500, 9000.0, 20, False),
    ],
)
def test_when_starts_that_fail_break_the_executor(
    lasting: int, passing: int, seconds: float, able: int, is_given_up: bool
) -> None:
    """Of a patience of 300 seconds; with none, every failure counts."""
    given_up = partial(are_starts_given_up, lasting=lasting, passing=passing, able=able)
    assert given_up(seconds=seconds, patience=300.0) == is_given_up
    assert given_up(seconds=seconds, patience=0.0) == (
        not able and lasting + passing >= START_ATTEMPTS
    )


@pytest.mark.parametrize(
    ("phase", "outcome"),
    [
        (Phase.RUNNING, Outcome.ROLLED_BACK),
        (Phase.COMMITTING, Outcome.UNKNOWN),
        (Phase.COMMITTED, Outcome.COMMITTED),
    ],
)
@pytest.mark.parametrize("job_number", [1, 2, 3, 1000])
def test_phase_of_a_begun_job_is_its_outcome(
    job_number: int, phase: Phase, outcome: Outcome
) -> None:
    """The record speaks of the job whose number it bears."""
    assert outcome_at_end(job_number, Progress(job_number, phase)) is outcome


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("behind", [1, 2, 3])
def test_phase_of_an_earlier_job_says_nothing_of_a_later_one(
    phase: Phase, behind: int
) -> None:
    """A job after the last that was begun has never started."""
    assert outcome_at_end(4, Progress(4 - behind, phase)) is Outcome.NEVER_STARTED


def test_every_phase_has_an_outcome() -> None:
    """No phase that a worker can leave behind makes the judgement fail."""
    for phase in Phase:
        assert isinstance(outcome_at_end(1, Progress(1, phase)), Outcome)


@pytest.mark.parametrize("phase", Phase)
def test_job_that_may_not_write_is_rolled_back_whatever_was_lost(phase: Phase) -> None:
    """The database has let it write nothing; or it was never started."""
    assert outcome_at_end(1, Progress(1, phase), read_only=True) is Outcome.ROLLED_BACK
    never = outcome_at_end(2, Progress(1, phase), read_only=True)
    assert never is Outcome.NEVER_STARTED
    options = DEFAULTS.with_(read_only=True)
    lost = lost_result_error(ValueError(), Outcome.UNKNOWN, options)
    assert lost.outcome is Outcome.ROLLED_BACK


BACK, NEVER = Outcome.ROLLED_BACK, Outcome.NEVER_STARTED
DONE, UNKNOWN = Outcome.COMMITTED, Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("outcome", "timeout", "kind", "repeats"),
    [
        (BACK, None, WorkerDiedError, True),
        (NEVER, None, WorkerDiedError, False),
        (DONE, None, ResultLostError, False),
        (UNKNOWN, None, OutcomeUnknownError, False),
        *((outcome, 2.0, JobTimeoutError, False) for outcome in Outcome),
    ],
)
@pytest.mark.parametrize("killed_for", [None, "kill_workers() was called"])
def test_death_of_a_worker_is_told_of_its_first_job_by_its_outcome(
    outcome: Outcome,
    timeout: float | None,
    kind: type[DBPoolError],
    repeats: bool,
    killed_for: str | None,
) -> None:
    """The class says what to do, and the death is the cause or the error itself."""
    error = error_at_end(Death(7, -9, killed_for), outcome, timeout=timeout)
    assert type(error) is kind
    assert error.outcome is outcome
    assert may_repeat(error) is repeats
    died = error if kind is WorkerDiedError else error.__cause__
    assert isinstance(died, WorkerDiedError)
    assert (died.pid, died.exitcode, died.killed_for) == (7, -9, killed_for)
    assert ("OOM" in str(died)) is (killed_for is None)
    assert (str(killed_for) in str(died)) is (killed_for is not None)


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("timeout", [None, 2.0])
def test_answer_of_the_server_decides_what_was_unknown(
    outcome: Outcome, timeout: float | None
) -> None:
    """It ends as if that had been known at once."""
    unknown = error_at_end(Death(7, -9), UNKNOWN, timeout=timeout)
    error = resolved_error(unknown, outcome)
    assert error.outcome is outcome
    assert type(error) is type(error_at_end(Death(7, -9), outcome, timeout=timeout))


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (-9, "was killed by the executor itself with SIGKILL: why"),
        (-15, "was killed by the executor itself with SIGTERM: why"),
        (None, "was killed by the executor itself: why"),
        (1, "was killed by the executor itself: why"),
        (-11, "was killed by SIGSEGV: a fault in an extension module"),
    ],
)
def test_worker_that_the_executor_has_killed_did_not_run_out_of_memory(
    exitcode: int | None, words: str
) -> None:
    """Unless another signal was faster, the reason is known."""
    assert str(death_of(7, exitcode, "why")) == f"worker 7 {words}"


def test_exit_status_that_is_not_to_be_had_is_not_guessed() -> None:
    """Somebody else has reaped the worker."""
    text = str(error_at_end(death_of(7, None, None), BACK))
    assert "its exit status is not to be had" in text
    assert not {"memory", "OOM", "SIG"} & set(re.findall(r"\w+", text))


@pytest.mark.parametrize(("told", "outcome"), [(None, DONE), (UNKNOWN, UNKNOWN)])
def test_lost_result_is_of_a_job_that_was_committed_or_committed_by_itself(
    told: Outcome | None, outcome: Outcome
) -> None:
    """The worker has told, if that is not known."""
    cause = ValueError("no")
    error = lost_result_error(cause, told, DEFAULTS)
    assert error.outcome is outcome
    assert error.__cause__ is cause


def test_job_that_no_worker_got_was_never_started() -> None:
    """It had come back from one when all were killed."""
    error = never_sent_error("kill_workers() was called")
    assert error.outcome is NEVER
    assert "kill_workers() was called" in str(error)
    assert not may_repeat(error)


def test_record_tells_the_last_job_and_its_phase() -> None:
    """What one side notes, the other reads, and a new job begins at RUNNING."""
    words = [0] * WORDS
    mine, theirs = PhaseRecord(words), PhaseRecord(words)
    assert theirs.read() == Progress(0, Phase.RUNNING)
    for number in (1, 2, 3, 7):
        assert mine.begin(number)
        assert theirs.read() == Progress(number, Phase.RUNNING)
        for phase in (Phase.COMMITTING, Phase.COMMITTED):
            mine.advance(phase)
            assert theirs.read() == Progress(number, phase)


def test_record_of_a_worker_that_never_began_gives_every_job_back() -> None:
    """A worker that died at birth has started none of its jobs."""
    progress = PhaseRecord([0] * WORDS).read()
    assert outcome_at_end(1, progress) is Outcome.NEVER_STARTED


def test_job_that_was_taken_back_does_not_begin() -> None:
    """Those up to the number that had not begun; those sent later do."""
    words = [0] * WORDS
    worker, parent = PhaseRecord(words), PhaseRecord(words)
    assert worker.begin(1)
    parent.recall(3)
    assert parent.read() == Progress(1, Phase.RUNNING)
    assert [worker.begin(number) for number in (2, 3, 4)] == [False, False, True]


# -- How many jobs are sent ahead ----------------------------------------------------


@pytest.mark.parametrize(
    ("unanswered", "workers", "usual_seconds", "share"),
    [
        (100, 4, math.inf, 25),
        (10, 4, 0.001, 3),
        (3000, 64, 192e-6, 47),
        (3000, 64, 30e-6, 300),  # the parent keeps no more than ten busy with these
        (3000, 64, 7e-6, 1000),
        (3000, 64, 2e-6, 3000),
        (3000, 2, 4e-6, 1500),
        (0, 2, 0.001, 0),
        (5, 0, 0.001, 5),  # none is ready yet
    ],
)
def test_share_of_each_worker(
    unanswered: int, workers: int, usual_seconds: float, share: int
) -> None:
    """Each row is one situation and the jobs that a worker is to have in it."""
    assert share == share_of_each(
        unanswered=unanswered, workers=workers, usual_seconds=usual_seconds
    )


@pytest.mark.parametrize(
    ("waiting", "sent", "seconds_per_job", "share", "count"),
    [
        (1, 0, math.inf, 1, 1),  # nothing is known: one
        (50, 0, math.inf, 25, 1),
        (50, 1, math.inf, 26, 0),  # and no other before it is answered
        (50, 0, 1.0, 25, 1),  # long ones go alone
        (50, 1, 1.0, 26, 0),
        (50, 0, 0.0051, 25, 1),
        (50, 0, 0.003, 25, 3),  # as many as five milliseconds are three times
        (50, 2, 0.003, 25, 1),
        (50, 0, 0.00099, 50, 15),  # three groups of five milliseconds of work
        (2000, 0, 19.9e-6, 1000, 753),
        (4000, 0, 1e-6, 2000, 1500),  # never more than three times five hundred
        (10, 0, 250e-6, 5, 5),  # shared among the workers
        (10, 4, 250e-6, 9, 5),  # with what they have
        (3, 12, 250e-6, 10, 0),
        (40, 0, 20e-6, 1, 14),  # but for work that is not worth a message
        (40, 10, 20e-6, 11, 14),
        (40, 10, 20e-6, 10, 0),
        (3, 0, 20e-6, 2, 3),
        (2000, 251, 19.9e-6, 1200, 502),  # filled up
        (2000, 502, 19.9e-6, 1200, 251),
        (2000, 503, 19.9e-6, 1200, 0),  # if there is room for a group
        (0, 0, 20e-6, 0, 0),
    ],
)
def test_number_of_jobs_to_send(
    waiting: int, sent: int, seconds_per_job: float, share: int, count: int
) -> None:
    """Each row is one situation and the number of jobs that it calls for."""
    assert count == jobs_to_send(
        waiting=waiting, sent=sent, seconds_per_job=seconds_per_job, share=share
    )


def test_idle_worker_always_gets_a_job_and_none_gets_too_much() -> None:
    """In every situation: progress, a bounded group, and no more than there are."""
    times = (1e-6, 2e-5, 1e-4, 9e-4, 1e-3, 2e-3, 3e-3, 5e-3, 0.1, 60.0, math.inf)
    for waiting, sent, seconds, others in product(
        range(0, 260, 13), range(0, 120, 7), times, range(0, 240, 60)
    ):
        share = -(-(waiting + sent + others) // 2)
        count = jobs_to_send(
            waiting=waiting, sent=sent, seconds_per_job=seconds, share=share
        )
        assert 0 <= count <= waiting
        assert sent or not waiting or count >= 1
        assert not count or sent + count == 1 or (sent + count) * seconds <= 0.0151
        group = group_size(seconds)
        assert group == 1 or group * seconds <= 0.005
        assert count <= 3 * group <= 1500


@pytest.mark.parametrize(
    (
        "waiting",
        "fewest",
        "most",
        "seconds_per_job",
        "bytes_per_answer",
        "milliseconds",
    ),
    [
        (0, 1, 1, 20e-6, 50, 0),  # the only one: its answer is waited for
        (0, 0, 0, 20e-6, 50, 0),
        (0, 8, 8, 20e-6, 50, 0),  # not worth it
        (0, 20, 20, 20e-6, 50, 0.2),  # half of what is left
        (0, 100, 200, 20e-6, 50, 1),
        (900, 350, 700, 20e-6, 50, 2.02),  # what is left until one group is left
        (900, 250, 700, 20e-6, 50, 0),
        (900, 750, 750, 20e-6, 50, 4),  # then it would have to wait for a reader
        (900, 750, 750, 20e-6, 400, 1.6384),
        (0, 100, 100, 20e-6, 9000, 0),
        (0, 2, 2, 0.3, 50, 10),  # never longer than two groups are meant to take
        (0, 2, 2, math.inf, math.inf, 0),
        (0, 0, 11, 20e-6, 50, 0.2),  # the last jobs, of one worker: ten at once
        (0, 1, 11, 20e-6, 50, 0.2),
        (0, 1, 10, 20e-6, 50, 0),  # after it no more will come
        (900, 0, 11, 20e-6, 50, 0),  # one can be sent more
        (0, 1, 11, 51e-6, 50, 0),  # not so many that it is worth it
    ],
)
def test_nap_while_answers_add_up(
    waiting: int,
    fewest: int,
    most: int,
    seconds_per_job: float,
    bytes_per_answer: float,
    milliseconds: float,
) -> None:
    """Each row is one situation and the nap that it allows; a moment at most for a job."""
    seconds = partial(
        seconds_to_nap,
        waiting=waiting,
        fewest=fewest,
        most=most,
        seconds_per_job=seconds_per_job,
        bytes_per_answer=bytes_per_answer,
    )
    assert seconds(is_listening=False) == pytest.approx(milliseconds / 1000)
    nap = seconds(is_listening=True)
    assert nap in (0.0, 0.0002)
    assert not nap or (waiting == 0 and most * seconds_per_job > nap)


@pytest.mark.parametrize(
    ("nap", "seconds_per_job", "is_listening", "seconds"),
    [
        (0.004, 100e-6, False, 0.004),  # when it wakes
        (0.0, 0.003, False, 0.003),  # when the next answer comes
        (0.0, 300e-6, False, 300e-6),
        (0.0005, 3e-6, False, 0.0015),  # not as often as that
        (0.0, 300e-6, True, 0.0),  # as soon as it is woken
        (0.0, math.inf, True, 0.0),  # by the first jobs of all
        (0.0, math.inf, False, math.inf),
        (0.0, 150e-6, False, 0.0015),
        (0.0, 1e-6, True, 0.0015),  # not as soon as it is woken
    ],
)
def test_when_callers_give_way(
    nap: float, seconds_per_job: float, is_listening: bool, seconds: float
) -> None:
    """Each row is one situation and when the dispatcher will have something to do."""
    assert seconds == seconds_until_due(
        nap=nap, seconds_per_job=seconds_per_job, is_listening=is_listening
    )


@pytest.mark.parametrize(
    ("sent", "seconds_at_job", "seconds_per_job", "others_idle", "is_it"),
    [
        (1, 9.0, 1e-4, True, False),  # that one it has begun
        (2, 0.0049, 1e-4, False, False),
        (2, 0.005, 1e-4, False, True),  # it is stuck at a long one
        (51, 0.0, 1e-4, False, False),
        (50, 0.0, 1e-4, True, False),
        (51, 0.0, 1e-4, True, True),  # and another could do them
    ],
)
def test_jobs_that_are_taken_back(
    sent: int,
    seconds_at_job: float,
    seconds_per_job: float,
    others_idle: bool,
    is_it: bool,
) -> None:
    """Each row is one situation of a worker that has jobs sent ahead."""
    assert is_it is is_taken_back(
        sent=sent,
        seconds_at_job=seconds_at_job,
        seconds_per_job=seconds_per_job,
        others_idle=others_idle,
    )


def test_sample_of_more_than_twice_is_believed_at_once() -> None:
    """One long job stops the sending ahead; it takes many short ones to resume it."""
    assert updated_estimate(math.inf, 0.5) == 0.5
    assert updated_estimate(1e-5, 3.0) == 3.0
    known, steps = 3.0, 0
    while known > 1e-4:
        smaller = updated_estimate(known, 1e-5)
        assert 1e-5 < smaller < known
        known, steps = smaller, steps + 1
    assert 20 < steps < 200


def test_estimate_is_a_low_average_of_what_differs_little() -> None:
    """Not what was longest of late: workers would run out before they are looked at."""
    assert updated_estimate(1e-3, 2.0001e-3) == 2.0001e-3
    assert updated_estimate(1e-3, 1.8e-3) == pytest.approx(1.1e-3)
    assert updated_estimate(1e-3, 1.8e-3, 100) == pytest.approx(1.1e-3)
    assert 0.5e-3 < updated_estimate(1e-3, 0.5e-3, 20) < 0.54e-3
    known = 1e-3
    for _ in range(50):
        known = updated_estimate(known, 1.5e-3, 10)
    assert known == pytest.approx(1.5e-3, rel=0.01)


def test_average_does_not_follow_one_that_is_long() -> None:
    """As the estimate does, for which it would be a mistake to be too low."""
    assert moving_average(math.inf, 0.5) == 0.5
    assert moving_average(1e-3, 0.1) == pytest.approx(1e-3 + 0.099 / 8)
    for sample in (0.2e-3, 1e-3, 1.9e-3):
        assert moving_average(1e-3, sample, 7) == updated_estimate(1e-3, sample, 7)


@pytest.mark.parametrize("attempts", [1, 2, 3, 7, 8, 50, 10**9])
def test_repeats_wait_a_random_part_of_an_ever_longer_time(attempts: int) -> None:
    """Doubled from 50 ms up to five seconds; at random from nothing to all of it."""
    longest = min(0.05 * 2.0 ** min(attempts - 1, 20), 5.0)
    assert delay_before_repeat(attempts, 0.0) == 0.0
    assert delay_before_repeat(attempts, 0.5) == pytest.approx(longest / 2)
    assert delay_before_repeat(attempts, 1.0) == pytest.approx(longest)
