"""The commands of `zeta`, one module each."""
