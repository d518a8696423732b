"""The ops in plain torch: the oracle every other implementation is held to. Runs on any device."""
