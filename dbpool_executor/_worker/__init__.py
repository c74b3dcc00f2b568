"""A job as one transaction: main loop, session, commits, time limit.

Runs in a worker. In come messages with calls; out go messages with results or failures.
"""
