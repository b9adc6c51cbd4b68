"""Fine-tuning: the tilt e^r put into the weights of a map, by the paper's objective and by its rivals."""
