"""Imported once by the server that ranks are forked from: what a rank's test module would otherwise import again.

`from mlflow import ...` alone takes a second and a half, and a rank imports the module that its function is in.
"""

import hypothesis
import kto_dist.precompute
import kto_dist.train
import pytest
import torch._dynamo
import transformers.models.llama.modeling_llama
from deepspeed.runtime.zero.muon import muon_optimizer
from mlflow import MlflowClient

__all__ = ["MlflowClient", "hypothesis", "kto_dist", "muon_optimizer", "pytest", "torch", "transformers"]
