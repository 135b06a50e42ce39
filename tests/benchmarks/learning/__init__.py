"""What is learned: comparisons of whole training runs, on CPUs, from equal seeds."""
