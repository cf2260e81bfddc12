"""Measurements beside peers, in one run each: what `sparserefine bench` calls. Nothing here runs in the node."""
