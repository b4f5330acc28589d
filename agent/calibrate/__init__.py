"""`assay calibrate`: the sensors' tolerances measured on this machine, on clean operators and on clean training."""
