"""Options and reports of the commands; imports no torch."""
