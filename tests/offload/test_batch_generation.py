"""transformers' continuous batching keeps its keys and values in what the session reserves."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from offload import ConfigError, offload
from offload.kv import batch_generation
from tests.architectures import make, oracle_of
from tests.budgets import SOME, budget_for, spec_of
from tests.poison import poison_homes

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32]]
RESERVE = {"batch_size": 3, "max_tokens": 24}
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)


@pytest.fixture
def sized(monkeypatch):
    """The configurations that transformers is given."""
    found = []
    inner = batch_generation.BatchGeneration._sized

    def spying(self, given):
        found.append(inner(self, given))
        return found[-1]

    monkeypatch.setattr(batch_generation.BatchGeneration, "_sized", spying)
    return found


def test_tokens_are_the_plain_models_and_the_cache_is_what_was_reserved(sized):
    model = make("llama")
    twin = oracle_of(model)
    budget = budget_for(spec_of(model, **RESERVE), SOME, 3, 24)
    with offload(model, device="cpu", cpu_memory=budget, **RESERVE) as session:
        assert session.plan.weights.streamed
        poison_homes(session)
        found = session.model.generate_batch(PROMPTS, GREEDY)
        assert any("sequences beyond that wait" in sentence for sentence in session.report().fallbacks)
    for prompt, output in zip(PROMPTS, found.values(), strict=True):
        wanted = twin.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
        assert output.generated_tokens == wanted[: len(output.generated_tokens)]
        assert output.error is None
    (config,) = sized
    page = getattr(config, "page_size", None) or config.block_size
    assert config.num_blocks * page == 3 * 24
    assert config.max_requests_per_batch == 3
    assert "init_continuous_batching" not in vars(model)


def test_a_larger_cache_than_reserved_and_graphs_of_addresses_are_refused():
    model = make("llama")
    with offload(model, device="cpu", cpu_memory="16MiB", **RESERVE) as session:
        for given, said in (({"num_blocks": 100}, "fit what is reserved"), ({"use_cuda_graph": True}, "use_cuda_graph=False")):
            config = ContinuousBatchingConfig(**given)
            with pytest.raises(ConfigError, match=said):
                session.model.generate_batch(PROMPTS, GREEDY, continuous_batching_config=config)
