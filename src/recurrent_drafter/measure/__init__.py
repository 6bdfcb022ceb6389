"""The one ruler: arms, interleaved, judged and compared; acceptance along known replies; tuning."""
