"""Imported once by the server that ranks are forked from."""

import torch._dynamo
from deepspeed.runtime.zero.muon import muon_optimizer

import kto_dist.train

__all__ = ["kto_dist", "muon_optimizer", "torch"]
