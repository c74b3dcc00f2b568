"""A row for each job that has a key, written in the job's own transaction.

Runs in both processes. In come keys and results; out go rows, and what they say of a key.
"""
