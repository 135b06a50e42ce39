"""The composition root: command line, configuration, and the local and Slurm launchers.

May import `data_pipeline` and `zeta`, which never import it.
"""
