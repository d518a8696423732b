"""The ops in Triton. Imported only when a Triton implementation is asked for."""
