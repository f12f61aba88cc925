"""The command line: options, verbs, how a process ends. No torch at import."""
