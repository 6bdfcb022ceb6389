"""Options that only the command line has, each written once and checked where it is made. Nothing here loads torch."""
