"""`model.cuda()` inside of a session on another card than the first. (There is one card at most: only the disguise is asked.)"""

import pytest
import torch
from torch import nn

from offload.errors import SessionError
from offload.runtime.late_generation import GenerationWatch
from offload.runtime.model_facade import OffloadedModelClass


@pytest.fixture
def model():
    model = nn.Linear(2, 2)
    facade = OffloadedModelClass(model, torch.device("cuda", 1), lambda sentence: None, GenerationWatch(model))
    yield model
    facade.undo()


@pytest.mark.parametrize("index", [None, 1, torch.device("cuda", 1)])
def test_the_card_that_it_is_on_is_meant(model, index):
    with pytest.warns(UserWarning, match="computes on cuda:1 already"):
        assert model.cuda(index) is model


def test_another_card_is_refused(model):
    with pytest.raises(SessionError, match="offloaded to cuda:1"):
        model.cuda(0)
