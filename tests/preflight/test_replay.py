"""Whether a run replays routes."""

from __future__ import annotations

import pytest
from support.shapes import small_shape

from r1zero.models.config import Experts
from r1zero.preflight.checks import check
from r1zero.preflight.replay import check_replay, replay_cautions, replay_line, replays_routes
from r1zero.preflight.resolve import load_config

DENSE = small_shape()


def moe(count: int = 8):
    return small_shape(experts=Experts(count=count, top_k=2, ffn_hidden_size=48, layers=(0, 1)))


def config(*overrides: str):
    return load_config("tiny", list(overrides))[0]


@pytest.mark.parametrize(
    ("asked", "shape", "replays"),
    [
        (None, moe(), True),
        (None, DENSE, False),
        (None, None, False),  # a dry run without the model
        (None, moe(257), False),
        (True, moe(), True),
        (False, moe(), False),
    ],
)
def test_replay_is_on_where_it_can_be(asked, shape, replays):
    cfg = config() if asked is None else config(f"actor_rollout.routing_replay={asked}".lower())
    assert replays_routes(cfg, shape) == replays
    assert check_replay(cfg, shape) == []


def test_what_cannot_replay_is_refused():
    asked = config("actor_rollout.routing_replay=true")
    [problem] = check(asked)
    assert problem.startswith("actor_rollout.routing_replay: true, but the model ")
    assert problem.endswith(" has no experts; leave it out")
    [problem] = check_replay(asked, moe(257))
    assert "257 experts in a layer, more than 256" in problem


ENGINE = """
from r1zero.models.layout import WeightLayout
class Engine:
    layout = WeightLayout(names="megatron", cut=True)
    {more}
    @classmethod
    def build(cls, setup): ...
"""


def test_an_own_engine_says_whether_it_tells_where_tokens_went(tmp_path):
    (tmp_path / "silent.py").write_text(ENGINE.format(more=""))
    (tmp_path / "telling.py").write_text(ENGINE.format(more="keeps_routes = True"))
    silent = f"actor_rollout.engine={tmp_path}/silent.py:Engine"
    assert not replays_routes(config(silent), moe())
    [problem] = check_replay(config(silent, "actor_rollout.routing_replay=true"), moe())
    assert "silent.py:Engine does not tell which experts tokens go to; leave it out" in problem
    assert replays_routes(config(f"actor_rollout.engine={tmp_path}/telling.py:Engine"), moe())


def test_a_line_says_whether_routes_are_replayed():
    assert replay_line(config(), moe()) == "routing replay: on, 4 bytes a token"
    off = replay_line(config("actor_rollout.routing_replay=false"), moe())
    assert off == "routing replay: off, as actor_rollout.routing_replay says"
    assert replay_line(config(), DENSE) == replay_line(config(), None) == ""


def test_who_does_not_replay_and_did_not_say_so_is_warned(tmp_path):
    (tmp_path / "silent.py").write_text(ENGINE.format(more=""))
    silent = f"actor_rollout.engine={tmp_path}/silent.py:Engine"
    told = replay_line(config(silent), moe())
    assert told.startswith("routing replay: off: the engine ")
    assert told.endswith("silent.py:Engine does not tell which experts tokens go to")
    [warning] = replay_cautions(config(silent), moe())
    assert warning.startswith("actor_rollout.routing_replay: off, since the engine ")
    assert warning.endswith("set it to false if that is meant")
    assert replay_cautions(config(silent, "actor_rollout.routing_replay=false"), moe()) == []
    assert replay_cautions(config(), moe()) == replay_cautions(config(silent), DENSE) == []
