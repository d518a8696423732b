"""The demo: a tiny language model, its task, and the run that aligns it."""
