"""Damaged and hostile input of every kind that is read, at a size that fits the suite.

Each test mutates something whole, from a fixed seed, and first tries what once failed. It holds
that the result is right, or an error that users can correct, of one line; see `tests.mutate`.
"""
