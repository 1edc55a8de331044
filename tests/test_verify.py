"""verify: a rewrite that changed what the rest of the graph relies on is named."""

import pytest
import torch
from torch import fx

from int8fx.passes.graph.verify import RewriteError, Signature, verify


def test_verify_names_a_rewrite_that_changed_the_shape():
    graph = fx.Graph()
    node = graph.placeholder("x")
    before = Signature((2, 3), torch.float32, torch.device("cpu"))
    after = Signature((3, 2), torch.float32, torch.device("cpu"))
    with pytest.raises(RewriteError, match=r"x was .*\(2, 3\).* and became .*\(3, 2\)"):
        verify(None, [(node, before, after)])
