"""`model` and `train` open on a GPU machine that has torch, numpy, safetensors, yaml and tqdm, and nothing more."""

import subprocess
import sys

import pytest

from .conftest import ROOT, environment

ABSENT = ("tokenizers", "datasets", "wandb", "transformers", "matplotlib", "jinja2", "pyarrow", "huggingface_hub")
CODE = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ImportError("not on this machine: " + name)
sys.meta_path.insert(0, Block())
importlib.import_module({module!r})
"""


@pytest.mark.parametrize("module", ["model", "train.loop", "train.checkpoint", "eval.report"])
def test_a_module_opens_without_the_optional_packages(module):
    code = CODE.format(absent=ABSENT, module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]


def test_the_model_opens_without_the_compiler():
    """torch._dynamo takes a second to import, and a decorator of torch.compiler is enough to import it."""
    code = "import sys, model, train.loop; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == 0
