"""An example of a command plugin: the arithmetic intensity of a problem."""
