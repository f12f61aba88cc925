"""What a model says of pairs: predict, verify, evaluate."""
