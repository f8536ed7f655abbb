"""A causal language model that scores completions, and the engines that shard it. The only importer of deepspeed.

May import: `data`, `base` and kto_kernels. Open first: `causal_lm.py`, then `engines.py`.
"""
