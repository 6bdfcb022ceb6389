"""The command line (layer 4): arguments in, text out, exit codes; the work is done in the layers below."""
