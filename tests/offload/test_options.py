"""Options as objects, beside the flat keywords."""

import pytest

from offload import ConfigError, ExpertOptions, KvOptions, offload
from tests.architectures import make


def test_objects_mean_what_the_keywords_mean():
    model, place = make("llama"), {"device": "cpu", "cpu_memory": "1MiB", "max_tokens": 64}
    with offload(model, kv_memory="256KiB", kv_policy="int8", expert_policy="lru", **place) as session:
        flat = session.plan, session.report().exactness
    options = {"kv": KvOptions.parse("256KiB", "int8"), "experts": ExpertOptions("lru")}
    with offload(model, **options, **place) as session:
        assert (session.plan, session.report().exactness) == flat


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv": KvOptions(), "kv_policy": "int8"}, "kv="),
        ({"experts": ExpertOptions(), "expert_misses": "load"}, "experts="),
    ],
)
def test_both_at_once_are_refused(options, name):
    with pytest.raises(ConfigError, match=name):
        offload(make("llama"), device="cpu", **options)
