"""What decides: pure functions over plain state, without I/O.

Runs in the parent. The dispatcher calls them and does what they say.
"""

from __future__ import annotations

import math

START_ATTEMPTS = 3
"""Workers in a row that may fail to start before the executor is broken."""

DELIVERY_ATTEMPTS = 3
"""Workers that may die over one job before they have begun it."""

PATIENCE = 0.005
"""Seconds for which jobs may wait behind one that turns out to be long, or for a busy
worker while another is idle, before they are taken back."""

_GROUP_SECONDS = 0.005  # work in one message
_TURN_SECONDS = 0.0015  # between two turns, while callers submit jobs of microseconds
_GROUP_MOST = 500  # jobs, however short
_GROUPS = 3  # that a worker may have
_LEAST_SECONDS = 0.0003  # work in a message, if so much waits; a tenth is its cost
_PARENT_SECONDS = 3e-6  # that the parent needs for each job, however short
_UNREAD_BYTES = 1 << 15  # that a channel takes on every system
_UNREAD_ANSWERS = 200  # of which each takes memory beside its bytes
_MANY = 4  # answers that are worth a nap
_SHORTEST_NAP = 0.0002  # seconds; below it the system's timers cost more than they save

_FIRST_DELAY = 0.1  # seconds between a failed start and the next one
_LONGEST_DELAY = 5.0
_FIRST_REPEAT = 0.05  # seconds, at most, before a job is repeated for the first time


def workers_to_start(
    *, waiting: int, idle: int, starting: int, alive: int, max_workers: int
) -> int:
    """Say how many workers to start now.

    Args:
        waiting: Jobs not yet sent to a worker.
        idle: Workers that are ready and have no job.
        starting: Workers that are not ready yet.
        alive: All workers that may still get jobs, idle and starting ones included.
        max_workers: Upper bound on ``alive``.

    Returns:
        A number >= 0. An idle or starting worker is counted on before a new one.
    """
    return max(0, min(waiting - idle - starting, max_workers - alive))


def share_of_each(*, unanswered: int, workers: int, usual_seconds: float) -> int:
    """Say how many jobs each worker would have, if all were shared evenly.

    Not among more workers than can be kept busy: to divide jobs of some microseconds
    more finely takes the parent longer than they take.

    Args:
        unanswered: Jobs, sent or not.
        workers: That are ready.
        usual_seconds: How long jobs usually take; infinite while that is not known.
    """
    busy = math.ceil(min(workers, usual_seconds / _PARENT_SECONDS))
    return -(-unanswered // max(1, busy))


def jobs_to_send(*, waiting: int, sent: int, seconds_per_job: float, share: int) -> int:
    """Say how many jobs to send to a worker now.

    Short ones go in groups, which is what makes them cheap, and the next groups before
    the last one is done; one that may be long goes alone.

    A worker that has room for a group is filled up, whether it needs more yet or not:
    so all workers are filled in the same turns of the dispatcher, and those are few.
    The last jobs are shared with what each has, for all to be done at the same time; but
    a few of some microseconds go to one.

    Args:
        waiting: Jobs not yet sent to a worker.
        sent: Jobs that this worker has and has not answered.
        seconds_per_job: How long recent jobs took; infinite while none is known.
        share: Jobs for each worker, from :func:`share_of_each`.

    Returns:
        A number >= 0.
    """
    group = group_size(seconds_per_job)
    are_short = seconds_per_job <= _GROUP_SECONDS
    room = (_GROUPS * group if are_short else 1) - sent
    if room < group or share <= sent:
        return 0
    least = int(_LEAST_SECONDS / seconds_per_job)
    return min(room, max(share - sent, least), waiting)


def group_size(seconds_per_job: float) -> int:
    """Say how many jobs go in one message, at most.

    Args:
        seconds_per_job: How long recent jobs took; infinite while none is known.
    """
    return max(1, min(int(_GROUP_SECONDS / seconds_per_job), _GROUP_MOST))


def seconds_to_nap(
    *,
    waiting: int,
    fewest: int,
    most: int,
    seconds_per_job: float,
    bytes_per_answer: float,
    is_listening: bool,
) -> float:
    """Say how long answers may add up before they are looked at.

    To be woken for each answer costs more than a short job itself.

    Args:
        waiting: Jobs not yet sent to a worker.
        fewest: Jobs that a worker has and has not answered, where they are fewest.
        most: The same, where they are most.
        seconds_per_job: How long recent jobs took; infinite while none is known.
        bytes_per_answer: How long recent answers were.
        is_listening: Whether a new job would be something to do at once.

    Returns:
        The time until the worker with the fewest can be sent more: it has one group left
        then. Or half of the time until it has no more to do, since an estimate may be too
        high. A moment alone, while many answers come, if no job waits and one that comes
        must not wait long. 0 if it is not worth it.
    """
    if most < 2 or math.isinf(seconds_per_job):
        return 0.0
    ahead = fewest - group_size(seconds_per_job) if waiting else fewest / 2
    # A worker that has filled its channel waits for a reader.
    unread = min(_UNREAD_BYTES / bytes_per_answer, _UNREAD_ANSWERS)
    nap = min(ahead, unread) * seconds_per_job
    if nap >= _SHORTEST_NAP and not is_listening:
        return min(nap, (_GROUPS - 1) * _GROUP_SECONDS)
    answers = min(_SHORTEST_NAP / seconds_per_job, unread)
    return _SHORTEST_NAP if not waiting and _MANY <= answers < most else 0.0


def seconds_until_due(
    *, nap: float, seconds_per_job: float, is_listening: bool
) -> float:
    """Say when the dispatcher will want the interpreter, so that callers give way then.

    One that submits in a loop would keep it for 5 ms (``sys.getswitchinterval()``), and
    longer if it has to share its processor with workers, which run out of jobs meanwhile.

    Args:
        nap: Seconds that the dispatcher naps.
        seconds_per_job: How long jobs usually take; infinite while none is known.
        is_listening: Whether it is woken by the next job.

    Returns:
        Seconds from now, or from when it is woken. Not soon if jobs take microseconds: a
        turn costs the time of many of them.
    """
    soonest = 0.0 if seconds_per_job >= _SHORTEST_NAP else _TURN_SECONDS
    return soonest if is_listening else max(nap, seconds_per_job, soonest)


def is_taken_back(
    *, sent: int, seconds_at_job: float, seconds_per_job: float, others_idle: bool
) -> bool:
    """Say whether the jobs that a worker has not begun are taken back.

    Args:
        sent: Jobs that it has and has not answered.
        seconds_at_job: How long it may have been at the first of them.
        seconds_per_job: How long recent jobs took.
        others_idle: Whether another worker has nothing to do.
    """
    if sent < 2:
        return False
    if seconds_at_job >= PATIENCE:
        return True
    return others_idle and (sent - 1) * seconds_per_job >= PATIENCE


def delay_before_repeat(attempts: int, random: float) -> float:
    """Say how long to wait before a job is repeated: back-off with full jitter.

    Args:
        attempts: How often it has failed, at least once.
        random: A random number from 0 to 1.

    Returns:
        Seconds.
    """
    doublings = min(attempts - 1, 10)
    return float(min(_FIRST_REPEAT * 2**doublings, _LONGEST_DELAY) * random)


def moving_average(known: float, sample: float, jobs: int = 1) -> float:
    """Update an average that leans to the low side.

    Args:
        known: The average so far; infinite if there is none.
        sample: What jobs took, on average, or one has taken up to now.
        jobs: How many.

    Returns:
        An eighth of the way to the sample for each job if it is less. If it is more, an
        eighth, however many they are: what takes a processor for a moment would make
        groups small, and workers run out of jobs before they are looked at.
    """
    if math.isinf(known):
        return sample
    steps = 1 if sample > known else jobs
    return sample + (known - sample) * 0.875**steps


def updated_estimate(known: float, sample: float, jobs: int = 1) -> float:
    """Update an estimate that is not to be too low.

    Args:
        known: The estimate so far; infinite if there is none.
        sample: As for :func:`moving_average`.
        jobs: As there.

    Returns:
        The moving average; the sample itself if it is more than twice as much: to send
        jobs behind a long one is a mistake.
    """
    return sample if sample > 2 * known else moving_average(known, sample, jobs)


def are_starts_given_up(
    *, lasting: int, passing: int, seconds: float, patience: float, able: int
) -> bool:
    """Say whether workers that failed to start break the executor.

    Args:
        lasting: That failed since one has not, and not for a reason that may pass.
        passing: Those that failed for one, such as a database that is down.
        seconds: Since the first of all these.
        patience: Seconds for which the latter do not count.
        able: Workers that are able to do jobs. While there is one, it is not broken.
    """
    if able:
        return False
    counted = lasting if seconds < patience else lasting + passing
    return counted >= START_ATTEMPTS


def delay_before_start(tries: int, patience_left: float = math.inf) -> float:
    """Say how long the next start waits, after one that has failed.

    Args:
        tries: Starts since then, the one that failed included.
        patience_left: Seconds until failures are no longer expected to pass: the last
            try is then, and not later.

    Returns:
        Seconds.
    """
    delay = min(_FIRST_DELAY * 2 ** min(tries - 1, 10), _LONGEST_DELAY)
    return float(delay if patience_left <= 0 else min(delay, patience_left))
