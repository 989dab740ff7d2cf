"""An example of an architecture plugin: a Llama whose attention and MLP run side by side."""
