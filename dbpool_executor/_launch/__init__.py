"""Starts and ends workers, and readies the parent for it.

Runs in the parent. In come a worker's setup; out go a worker process with its channel.
"""
