"""What a fork must not share: connections, channels' ends, locks.

Runs in every process that imports the package, at each fork of it. In come the connections and ends that are open; out go copies of the process that leave them alone.
"""
