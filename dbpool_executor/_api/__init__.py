"""What a user calls: the executor, its views, their arguments, the results of ``map()``.

Runs in the parent, in callers' threads. In come a function and plain values; out go a job, which is its future.
"""
