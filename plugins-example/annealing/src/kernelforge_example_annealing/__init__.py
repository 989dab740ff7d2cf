"""An example of a tuner plugin: simulated annealing."""
