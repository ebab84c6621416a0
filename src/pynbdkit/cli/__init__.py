"""The command lines: options, usage texts, exit codes, and what a daemon needs."""
