"""The public ops: one file each, holding its contract, its argument checks and its registration with torch."""
