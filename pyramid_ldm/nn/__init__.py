"""Building blocks that know no config: layers, re-sampling, attention, residual blocks."""
