"""What is counted rather than timed, and where the time of a generation goes."""
