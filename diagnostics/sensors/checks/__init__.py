"""One file per kind of operation: what must hold of its result, how far roundings may stray, and what a check reads."""
