"""The report of a run: records, tables, figures and the page itself.

Imports `launch.config`; nothing that trains.
"""
