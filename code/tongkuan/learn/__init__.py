"""Training: which pairs a step sees, the step, the run folder, the loop."""
