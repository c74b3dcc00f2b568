"""All that drivers and databases differ in. A new driver is added here and nowhere else.

Runs in every process that imports the package. In come a driver's connection or exception; out go what it says of its transaction, and what cancels it.
"""
