"""``python -m dbpool_executor check`` and ``demo``.

Runs in the parent, and workers of its own. In come a command line; out go a report.
"""
