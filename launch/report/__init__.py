"""Report of a run: its files, headline numbers, charts, tables and the HTML page.

Imports `launch.config`; nothing that trains.
"""
