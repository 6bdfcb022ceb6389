"""The command line: arguments in, text out, exit codes; the work is done in the layers below."""
