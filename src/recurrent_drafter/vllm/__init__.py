"""Recurrent drafters inside vLLM: the plugin, the proposer, and what stands between them and vLLM 0.32."""
