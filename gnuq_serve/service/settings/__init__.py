"""The operator's settings: what there is, where it is given, and what contradicts."""
