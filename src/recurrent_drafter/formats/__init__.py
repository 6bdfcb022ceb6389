"""Drafters in other packages' layouts: Apple's and ``speculators``'."""
