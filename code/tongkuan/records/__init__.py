"""What users' files say: items, pairs, attributes, labels and pictures, each read in one place."""
