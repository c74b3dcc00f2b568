"""Jobs on their way: queue, workers, batches, retries, verdicts.

Runs in the parent, in the one thread of each executor that talks to workers. In come jobs, and messages of workers; out go messages to workers, and the ends of futures.
"""
