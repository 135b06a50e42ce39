"""The benchmark of one GPU, a section a file: `python -m tests.benchmarks.gpu`."""
