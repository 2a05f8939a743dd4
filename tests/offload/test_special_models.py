"""Models that do something out of the ordinary with their weights or their cache."""

import copy

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from offload import BudgetTooSmall, StaleSlot, offload
from tests.architectures import BY_NAME, SPECIAL, VOCAB, make, oracle_of, text_inputs
from tests.budgets import NONE, budget_for, enter, spec_of
from tests.poison import poison_homes


@pytest.mark.parametrize("architecture", SPECIAL, ids=str)
def test_identical(architecture, tmp_path):
    """State-space caches, merged experts, position tables that are sliced and not looked up."""
    model = oracle_of(make(architecture.name))
    model.save_pretrained(tmp_path)
    budget = budget_for(spec_of(str(tmp_path), batch_size=2, max_tokens=24), NONE, 2, 24)
    inputs = architecture.inputs()
    prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    with enter(tmp_path, budget, batch_size=2, max_tokens=24) as session, torch.inference_mode():
        assert poison_homes(session)
        for _ in range(2):
            assert torch.equal(session.model(**inputs)[0], model(**inputs)[0])
        greedy = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(session.model.generate(**prompt, **greedy), model.generate(**prompt, **greedy))
        sliced = [sentence for sentence in session.report().fallbacks if "only indexed by rows" in sentence]
        assert bool(sliced) == (architecture.name == "whisper")
        assert session.report().decode.passes > 0


@pytest.mark.slow
def test_weights_that_the_model_itself_rescales(tmp_path):
    """RWKV divides some weights in place before its first pass; those edits must reach the slots."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    model = RwkvForCausalLM(
        RwkvConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32, intermediate_size=48, rescale_every=1
        )
    ).eval()
    model.save_pretrained(tmp_path)
    budget = budget_for(spec_of(str(tmp_path)), NONE, 2, 24)
    with enter(tmp_path, budget, batch_size=2, max_tokens=24) as session, torch.no_grad():
        for _ in range(2):
            assert torch.equal(
                session.model(text_inputs()["input_ids"]).logits, oracle_of(model)(text_inputs()["input_ids"]).logits
            )


def test_backward_through_a_sliced_table_raises(tmp_path):
    model = make("whisper")
    with offload(model, device="cpu", cpu_memory=budget_for(spec_of(model), NONE, 2, 24), batch_size=2, max_tokens=24):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.model.decoder.embed_positions.weight.requires_grad_(True)
        output = model(**BY_NAME["whisper"].inputs())
        with pytest.raises(StaleSlot):
            output.logits.sum().backward()


def test_sound_is_not_counted_in_tokens():
    """One second of it is 16,000 numbers, none of which takes memory of a KV cache."""
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB,
        conv_dim=[16, 16], conv_kernel=[10, 8], conv_stride=[5, 4], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model = Wav2Vec2Model(config).eval()
    sound = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        wanted = model(sound).last_hidden_state
        with offload(model, device="cpu", cpu_memory=3 * sum(value.nbytes for value in model.parameters())) as session:
            assert torch.equal(model(sound).last_hidden_state, wanted)
            assert any("takes no tokens" in sentence for sentence in session.report().fallbacks)


def test_the_least_budget_of_a_fast_path_is_told_and_works():
    """torch's encoder layer reads everything inside at once under no_grad: it is not taken apart."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 4).eval()
    inputs = torch.randn(2, 5, 64)
    with pytest.raises(BudgetTooSmall) as refusal:
        offload(model, device="cpu", cpu_memory="8KiB").__enter__()
    with torch.no_grad():
        wanted = model(inputs)
        with offload(model, device="cpu", cpu_memory=refusal.value.least_bytes) as session:
            assert torch.equal(model(inputs), wanted)
            assert session.report().links["disk"].bytes > 0


def test_a_config_with_lists_where_others_have_numbers():
    """SpeechT5's `conv_kernel` is one size a layer of its feature encoder."""
    from transformers import SpeechT5Config, SpeechT5ForSpeechToText

    torch.manual_seed(0)
    config = SpeechT5Config(
        vocab_size=40,
        hidden_size=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = SpeechT5ForSpeechToText(config).eval()
    twin = copy.deepcopy(model)
    given = {"input_values": torch.randn(1, 2000), "decoder_input_ids": torch.tensor([[2, 5, 6]])}
    with torch.no_grad(), offload(model, device="cpu", cpu_memory="100MiB", max_tokens=40) as session:
        assert torch.equal(session.model(**given).logits, twin(**given).logits)
