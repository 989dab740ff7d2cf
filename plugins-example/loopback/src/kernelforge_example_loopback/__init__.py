"""An example of a backend plugin: a target that hands every plan to numpy."""
