"""Imported once by the server that ranks are forked from: what a rank's test module would otherwise import again.

`from mlflow import ...` alone takes a second and a half, and a rank imports the module that its function is in.
"""

import hypothesis
import pytest
import torch._dynamo
import transformers.models.llama.modeling_llama
from deepspeed.runtime.zero.muon import muon_optimizer
from mlflow import MlflowClient

from kto_dist.training import loop, precompute

__all__ = ["MlflowClient", "hypothesis", "loop", "muon_optimizer", "precompute", "pytest", "torch", "transformers"]
