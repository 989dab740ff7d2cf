"""An example of a pass plugin: attention that was written out becomes one op."""
