"""Options, reports and exit codes of the commands. Imports no torch."""
