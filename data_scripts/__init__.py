"""From what the organiser hands out to what train reads: download, sample, resize, split, attributes. No torch."""
