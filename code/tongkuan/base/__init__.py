"""What every other room may use: errors, files that appear whole, the machine, metrics. No torch at import."""
