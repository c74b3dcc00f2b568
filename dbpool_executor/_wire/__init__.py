"""All that crosses between a worker and its parent, as bytes.

Runs in both processes. In come calls, results, exceptions, options, log records; out go messages.
"""
