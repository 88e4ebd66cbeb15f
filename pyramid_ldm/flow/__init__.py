"""Stage two: rectified flow, the pyramid NCSN++ and the samplers."""
