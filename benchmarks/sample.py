"""Takes one sample: measures one contender in one scenario, and prints its figures.

A program of its own, so that nothing that another contender has started, imported or
left in memory is there. It is also the main module of all workers, which import it: so
it imports nothing for them.
"""

if __name__ == "__main__":
    import json
    import multiprocessing
    import sys

    from contenders import CONTENDERS
    from scenarios import SCENARIOS

    scenario, contender, workers, size = sys.argv[1:]
    # What every worker needs is imported once for all of them, to save time: no figure
    # of a program that gets here has the start of a worker in it.
    multiprocessing.set_forkserver_preload(["sqlalchemy.orm", "psycopg"])
    measure = SCENARIOS[scenario].measure
    json.dump(measure(CONTENDERS[contender], int(workers), int(size)), sys.stdout)
