"""Which jobs go together to a worker, and in which messages.

Runs in the parent.
"""

from __future__ import annotations

import itertools
import operator
import pickle
from collections import deque
from collections.abc import Sequence

from .._wire.calls import dumps_calls
from .._wire.channel import Kind, Message
from .._wire.options import JobOptions, dumps_options
from .._wire.picklers import PROTOCOL
from .job import Job, taken

_GROUP_BYTES = 1 << 16  # of pickles in one message; a longer one goes alone


def next_jobs(waiting: deque[Job], count: int, *, alone: bool) -> list[Job]:
    """Take the next jobs that are not cancelled; one with a timeout only by itself.

    Args:
        waiting: The jobs.
        count: How many at most.
        alone: Whether the worker has no other job.
    """
    jobs: list[Job] = []
    size = 0
    options: JobOptions | None = None
    limited = False
    for _ in range(min(count, len(waiting))):
        job = waiting.popleft()
        if job.options is not options:
            options = job.options
            limited = options.timeout is not None
        if type(job.call) is not tuple:  # of short calls the count is bound enough
            size += len(job.call)
        if limited or size > _GROUP_BYTES:
            if jobs or (limited and not alone):
                waiting.appendleft(job)
            else:
                jobs.append(job)
            break
        jobs.append(job)
    return taken(jobs)


def messages_for(jobs: Sequence[Job], number: int) -> list[Message]:
    """Give what brings jobs to a worker: one message, if all have the same options.

    Args:
        jobs: They.
        number: Of the first of them, in the worker's life.
    """
    messages = []
    for options, group in itertools.groupby(jobs, operator.attrgetter("options")):
        members = list(group) if options.keyed else ()
        runs = [
            (None if isinstance(name, str) else name, [job.call for job in run])
            for name, run in itertools.groupby(
                members or group, operator.attrgetter("name")
            )
        ]
        encoded = dumps_options(options)
        others = [encoded]
        if options.keyed:
            others.append(pickle.dumps([job.keys for job in members], PROTOCOL))
        match runs:
            case [(None, [call])] if not isinstance(call, tuple):
                # It may be long, and to pickle it once more is to copy it.
                message = Message(Kind.JOB, [call, *others], number)
            case _:
                message = Message(Kind.JOBS, [dumps_calls(runs), *others], number)
        messages.append(message)
        number += sum(len(calls) for _, calls in runs)
    return messages
