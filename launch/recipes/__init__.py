"""Whole walks in one command: demo, fine-tuning, the experiment on mixed sizes.

Imports all rooms of `launch` but `launch.commands`.
"""
