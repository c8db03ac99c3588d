"""Presets: what each shipped one sets, whose word counts, and what is refused."""

from __future__ import annotations

import textwrap
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from support.small_config import write

from r1zero.config.load import CONFIGS, dump, read_config
from r1zero.config.presets import leaves, read_preset
from r1zero.config.schema import Config
from r1zero.errors import BadInput, Diagnostics
from r1zero.policy.actor_config import objective_of
from r1zero.preflight.checks import check
from r1zero.preflight.resolve import load_config

NO_KL = {"algorithm.kl_ctrl.type": "fixed", "algorithm.kl_ctrl.kl_coef": 0.0}
CLIP = {"actor_rollout.clip_ratio_low": 0.2, "actor_rollout.clip_ratio_high": 0.2}


def objective(advantage: str, loss: str, aggregation: str, equal_groups: str) -> dict[str, Any]:
    return {
        "algorithm.advantage": advantage,
        "algorithm.advantage_whiten": False,
        "algorithm.loss": loss,
        "algorithm.aggregation": aggregation,
        "algorithm.equal_groups": equal_groups,
    }


def kl(coefficient: float, place: str) -> dict[str, Any]:
    return {
        "algorithm.kl_ctrl.type": "fixed",
        "algorithm.kl_ctrl.kl_coef": coefficient,
        "algorithm.kl_in": place,
    }


# What each preset sets, from the paper that its file names.
EXPECTED: dict[str, dict[str, Any]] = {
    "r1_zero": objective("group_norm", "grpo", "sequence_mean", "keep")
    | {"actor_rollout.clip_ratio_low": 1.0, "actor_rollout.clip_ratio_high": 10.0}
    | kl(0.001, "loss")
    | {"algorithm.kl_penalty": "k3", "ref.reset_interval": 25},
    "grpo": objective("group_norm", "grpo", "token_mean", "keep") | CLIP | kl(0.001, "loss"),
    "gspo": objective("group_norm", "gspo", "sequence_mean", "skip")
    | {"algorithm.loss_settings.clip_low": 3e-4, "algorithm.loss_settings.clip_high": 4e-4}
    | NO_KL,
    "cispo": objective("group_norm", "cispo", "token_mean", "skip")
    | {"algorithm.loss_settings.ratio_cap": 5.0}
    | NO_KL,
    "dapo": objective("group_norm", "grpo", "token_mean", "replace")
    | {"actor_rollout.clip_ratio_low": 0.2, "actor_rollout.clip_ratio_high": 0.28}
    | NO_KL
    | {"algorithm.verifier_function": ["acc", "overlong"], "algorithm.verifier_weight": [1.0, 1.0]},
    "dr_grpo": objective("group_mean", "grpo", "constant", "skip") | CLIP | NO_KL,
    "rloo": objective("leave_one_out", "reinforce", "sequence_sum", "keep") | kl(0.05, "reward"),
    "reinforce_pp": objective("reinforce_pp", "grpo", "token_mean", "keep")
    | CLIP
    | kl(0.01, "reward"),
    "reinforce_pp_baseline": objective("reinforce_pp_baseline", "grpo", "token_mean", "keep")
    | CLIP
    | kl(0.01, "loss")
    | {"algorithm.kl_penalty": "k2"},
    "lite_ppo": objective("lite_ppo", "grpo", "token_mean", "keep") | CLIP | NO_KL,
}
# For every key that a preset sets, a value that this preset does not have.
OTHER: dict[str, Any] = {
    "algorithm.equal_groups": ("keep", "skip"),  # the first that differs
    "algorithm.kl_in": ("loss", "reward"),
    "algorithm.advantage_whiten": True,
    "algorithm.kl_penalty": "k1",
    "algorithm.verifier_function": ["acc"],
    "algorithm.verifier_weight": [0.5],
    "ref.reset_interval": 7,
    "algorithm.advantage": "mine.py:advantage",
    "algorithm.loss": "mine.py:loss",
    "algorithm.loss_settings.clip_low": 0.11,
    "algorithm.loss_settings.clip_high": 0.12,
    "algorithm.loss_settings.ratio_cap": 13.0,
    "algorithm.aggregation": "mine.py:aggregation",
    "algorithm.kl_ctrl.type": "adaptive",
    "algorithm.kl_ctrl.kl_coef": 0.3,
    "actor_rollout.clip_ratio_low": 0.15,
    "actor_rollout.clip_ratio_high": 0.35,
}
SHIPPED = sorted(path.stem for path in (CONFIGS / "algorithm").glob("*.yaml"))


def value_at(cfg: Config, key: str) -> Any:
    """The value of a key, which may lie in settings."""

    def below(place: Any, part: str) -> Any:
        return place[part] if isinstance(place, dict) else getattr(place, part)

    return reduce(below, key.split("."), cfg)


def with_preset(home: Path, preset: str) -> str:
    """base.yaml with a preset under `defaults`."""
    base = (home / "base.yaml").read_text()
    named = f"- model: [small]\n  - algorithm: {preset}"
    return write(home, "chosen", base.replace("- model: [small]", named))


def own_preset(home: Path, text: str, name: str = "mine") -> Path:
    path = home / "algorithm" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def test_every_shipped_preset_is_expected_here() -> None:
    assert sorted(EXPECTED) == SHIPPED


@pytest.mark.parametrize("config", ["tiny", "qwen25_7b"])
@pytest.mark.parametrize("preset", SHIPPED)
class TestShippedPreset:
    def test_it_sets_what_its_paper_says_and_breaks_no_rule(self, preset: str, config: str) -> None:
        cfg, _ = load_config(config, [f"algorithm={preset}"])
        assert check(cfg, absent_ok=True) == []
        for key, value in EXPECTED[preset].items():
            found = value_at(cfg, key)
            assert found == value and type(found) is type(value), key

    def test_it_sets_nothing_else(self, preset: str, config: str) -> None:
        read = read_preset(preset, CONFIGS, Diagnostics())
        assert read is not None
        assert {".".join(path) for path, _ in leaves(read.sections)} == set(EXPECTED[preset])

    def test_each_of_its_keys_can_be_overridden(self, preset: str, config: str) -> None:
        for key, value in EXPECTED[preset].items():
            other = OTHER[key]
            if isinstance(other, tuple):
                other = next(choice for choice in other if choice != value)
            if key.startswith("algorithm.kl_ctrl.type"):
                more = ["algorithm.kl_ctrl.target_kl=0.1", "algorithm.kl_ctrl.horizon=1000"]
            else:
                more = []
            override = f"{key}={str(other).lower() if other is True else other}"
            for line in (
                [f"algorithm={preset}", override, *more],
                [override, *more, f"algorithm={preset}"],
            ):
                assert value_at(read_config(config, line)[0], key) == other

    def test_the_resolved_configuration_tells_and_loads_back(
        self, preset: str, config: str, tmp_path: Path
    ) -> None:
        cfg, _ = load_config(config, [f"algorithm={preset}"])
        text = dump(cfg)
        comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
        assert comment.startswith(f"preset {preset} (") and "otherwise" not in comment
        assert all(key in comment for key in EXPECTED[preset])
        assert load_config(write(tmp_path, "again", text))[0] == cfg


# -- whose word counts --------------------------------------------------------------------------


def test_the_file_says_more_than_the_preset_that_it_names(home: Path) -> None:
    text = Path(with_preset(home, "gspo")).read_text()
    text = text.replace("algorithm: {", "algorithm: {kl_ctrl: {kl_coef: 0.3}, ")
    cfg, _ = load_config(write(home, "mine", text))
    assert (cfg.algorithm.loss, cfg.algorithm.kl_ctrl.kl_coef) == ("gspo", 0.3)
    assert cfg.algorithm.verifier_function == ["acc", "format"]
    assert cfg.preset is not None
    assert cfg.preset.endswith("; the run says otherwise: algorithm.kl_ctrl.kl_coef")


def test_the_command_line_says_more_than_the_file(home: Path) -> None:
    text = (home / "base.yaml").read_text()
    text = text.replace("algorithm: {", "algorithm: {kl_ctrl: {kl_coef: 0.3}, ")
    path = write(home, "mine", text)
    assert load_config(path, ["algorithm=gspo"])[0].algorithm.kl_ctrl.kl_coef == 0.0
    line = ["algorithm.kl_ctrl.kl_coef=0.2", "algorithm=gspo"]
    assert load_config(path, line)[0].algorithm.kl_ctrl.kl_coef == 0.2


def test_a_preset_of_the_command_line_takes_the_place_of_the_file_s(home: Path) -> None:
    own_preset(home, "algorithm: {missing_eos_penalty: 0.5, kl_ctrl: {kl_coef: 0.7}}")
    path = with_preset(home, "mine")
    of_file, _ = load_config(path)
    assert of_file.algorithm.missing_eos_penalty == 0.5
    replaced, _ = load_config(path, ["algorithm=cispo"])
    assert replaced.algorithm.missing_eos_penalty == 0.0
    assert (replaced.algorithm.loss, replaced.algorithm.kl_ctrl.kl_coef) == ("cispo", 0.0)


def test_a_preset_lies_over_the_model_file(home: Path) -> None:
    own_preset(home, "actor_rollout_ref: {actor_rollout: {adam_beta2: 0.5}}")
    text = (home / "model" / "small.yaml").read_text()
    (home / "model" / "small.yaml").write_text(text + "  adam_beta2: 0.9\n")
    assert load_config(with_preset(home, "mine"))[0].actor_rollout.adam_beta2 == 0.5


def test_a_key_of_a_role_that_stands_in_training_is_the_file_s_word(home: Path) -> None:
    own_preset(home, "actor_rollout_ref: {actor_rollout: {lr: 1e-3}, ref: {micro_batch_size: 7}}")
    text = Path(with_preset(home, "mine")).read_text()
    path = write(home, "mine", text.replace("training: {", "training: {lr: 2e-3, "))
    cfg, _ = load_config(path)
    assert (cfg.actor_rollout.lr, cfg.ref.micro_batch_size) == (2e-3, 2)
    assert load_config(path, ["training.lr=3e-3"])[0].actor_rollout.lr == 3e-3


def test_other_words_for_the_same_thing_count_as_said(home: Path) -> None:
    text = Path(with_preset(home, "grpo")).read_text()
    text = text.replace("    model: small\n", "    model: small\n    clip_ratio: 0.3\n")
    text = text.replace("algorithm: {", "algorithm: {adv_estimator: mine.py:own, ")
    cfg, warnings = read_config(write(home, "mine", text))
    assert cfg.algorithm.advantage == "mine.py:own"
    assert not any("adv_estimator" in warning or "clip_ratio" in warning for warning in warnings)
    actor = cfg.actor_rollout
    assert (actor.clip_ratio, actor.clip_ratio_low, actor.clip_ratio_high) == (0.3, None, None)


def test_settings_go_with_the_loss_that_they_are_of(home: Path) -> None:
    line = ["algorithm=gspo", "algorithm.loss=cispo"]
    cfg, _ = load_config(str(home / "base.yaml"), line)
    objective = objective_of(cfg.algorithm, cfg.actor_rollout)
    assert objective.settings == {"ratio_cap": 5.0}
    line = ["algorithm=gspo", "algorithm.loss=gspo", "algorithm.loss_settings.clip_high=0.0005"]
    cfg, _ = load_config(str(home / "base.yaml"), line)
    assert cfg.algorithm.loss_settings == {"clip_low": 3e-4, "clip_high": 5e-4}


@pytest.mark.parametrize(
    ("preset", "bounds"),
    [
        ("dapo", {"clip_low": 0.2, "clip_high": 0.28}),
        ("lite_ppo", {"clip_low": 0.2, "clip_high": 0.2}),
    ],
)
def test_bounds_of_a_preset_beat_settings_of_the_same_loss(
    home: Path, preset: str, bounds: dict[str, float]
) -> None:
    text = (home / "base.yaml").read_text()
    settings = "algorithm: {loss: grpo, loss_settings: {clip_low: 0.1, clip_high: 0.1}, "
    path = write(home, "mine", text.replace("algorithm: {", settings))
    cfg, warnings = load_config(path, [f"algorithm={preset}"])
    assert objective_of(cfg.algorithm, cfg.actor_rollout).settings == bounds
    assert not any("no effect" in warning and "clip_ratio" in warning for warning in warnings)
    line = [f"algorithm={preset}", "algorithm.loss_settings.clip_low=0.15"]
    cfg, _ = load_config(path, line)
    assert cfg.algorithm.loss_settings == {"clip_low": 0.15}


@pytest.mark.parametrize("key", ["advantage", "adv_estimator"])
def test_settings_go_with_the_advantage_that_they_are_of(home: Path, key: str) -> None:
    text = (home / "base.yaml").read_text()
    chosen = f"algorithm: {{{key}: pass_at_k, advantage_settings: {{k: 2}}, "
    path = write(home, "mine", text.replace("algorithm: {", chosen))
    for line in (["algorithm=grpo"], ["algorithm.adv_estimator=group_norm"]):
        cfg, _ = load_config(path, line)
        assert (cfg.algorithm.advantage, cfg.algorithm.advantage_settings) == ("group_norm", {})
        assert check(cfg) == []


def test_an_older_name_of_the_same_advantage_keeps_its_settings(home: Path) -> None:
    own_preset(home, "algorithm: {advantage: grpo, advantage_settings: {unknown: 2}}")
    line = ["algorithm=mine", "algorithm.advantage=group_norm"]
    cfg, _ = load_config(str(home / "base.yaml"), line)
    assert cfg.algorithm.advantage_settings == {"unknown": 2}


def test_a_mapping_as_a_whole_takes_the_place_of_the_file_s(home: Path) -> None:
    data = str(home / "train.parquet")
    text = (home / "base.yaml").read_text()
    blend = f"{{first: {{path: {data}}}, second: {{path: {data}}}}}"
    keys = f"training: {{evaluation: {blend}, map_keys: {{query: q, prompt: p}}, "
    text = text.replace("training: {", keys).replace(f"data_path: {data}", f"data_path: {blend}")
    path = write(home, "mine", text)
    line = [
        f"actor_rollout.data_path={{third: {{path: {data}}}}}",
        "actor_rollout.data_path.fourth.path=" + data,
        "training.evaluation={}",
        "training.map_keys={prompt: z}",
    ]
    cfg, _ = load_config(path, line)
    assert list(cfg.actor_rollout.data_path) == ["third", "fourth"]
    assert cfg.training.evaluation == {}
    assert (cfg.training.map_keys["query"], cfg.training.map_keys["prompt"]) == ("", "z")
    cfg, _ = load_config(path, ["training.map_keys.prompt=z"])
    assert (cfg.training.map_keys["query"], cfg.training.map_keys["prompt"]) == ("q", "z")
    line = ["algorithm=gspo", "algorithm.loss_settings={clip_high: 0.0005}"]
    cfg, _ = load_config(path, line)
    assert cfg.algorithm.loss_settings == {"clip_high": 5e-4}
    assert load_config(write(home, "again", dump(cfg)))[0] == cfg


def test_null_asks_for_the_default_below_a_preset(home: Path) -> None:
    line = ["algorithm=gspo", "algorithm.kl_ctrl=null", "algorithm.aggregation=null"]
    algorithm = load_config(str(home / "base.yaml"), line)[0].algorithm
    assert (algorithm.kl_ctrl.kl_coef, algorithm.aggregation) == (0.05, None)


# -- one's own, and what is refused ---------------------------------------------------------------


def test_an_own_preset_is_a_path_or_a_name_beside_the_file(home: Path) -> None:
    path = own_preset(home, "algorithm: {missing_eos_penalty: 0.5}\ntraining: {seed: 7}")
    for name in ("mine", str(path)):
        cfg, _ = load_config(str(home / "base.yaml"), [f"algorithm={name}"])
        assert (cfg.algorithm.missing_eos_penalty, cfg.training.seed) == (0.5, 7)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gsop", ["there is no preset gsop, only cispo", "did you mean gspo?"]),
        ("nothing", ["there is no preset nothing", "your own is a path, such as"]),
        ("./gone.yaml", ["there is no preset file gone.yaml"]),
    ],
)
def test_a_preset_that_is_not_there_is_named(home: Path, name: str, pieces: list[str]) -> None:
    for path, line in (
        (str(home / "base.yaml"), [f"algorithm={name}"]),
        (with_preset(home, name), []),
    ):
        with pytest.raises(BadInput) as caught:
            load_config(path, line)
        assert all(piece in str(caught.value) for piece in pieces)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("algorithm: {advantag: group_norm}", r"mine.yaml: algorithm.advantag is unknown; did you"),
        ("defaults: [{algorithm: gspo}]", "mine.yaml: defaults has no place in a preset; its"),
        ("name: mine", "mine.yaml: name has no place in a preset; its sections are training"),
        ("algorithm: 3", "algorithm: 3 must be a section with keys"),
        ("algorithm: {kl_ctrl: {kl_coef: much}}", "kl_coef: 'much' must be a number"),
        ("# nothing", "mine.yaml must hold sections such as"),
    ],
)
def test_a_wrong_preset_is_told(home: Path, text: str, sentence: str) -> None:
    own_preset(home, text)
    with pytest.raises(BadInput, match=sentence) as caught:
        load_config(str(home / "base.yaml"), ["algorithm=mine"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ("[{algorithm: gspo}, {algorithm: cispo}]", "given twice, as gspo and cispo; keep one"),
        ("[{algorithm: [gspo]}]", r"\['gspo'\] must be the name of a preset"),
        ("[{reward: gspo}]", "'gspo'} is unknown; it lists model files"),
    ],
)
def test_wrong_entries_of_defaults_are_told(home: Path, entries: str, sentence: str) -> None:
    text = (home / "base.yaml").read_text().replace("\n  - model: [small]", f" {entries}")
    path = write(home, "mine", text.replace("model: small\n", "\n"))
    with pytest.raises(BadInput, match=sentence) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["algorithm=3", "algorithm={loss: gspo}", "training=gspo"])
def test_a_section_itself_has_no_other_value(home: Path, override: str) -> None:
    with pytest.raises(BadInput, match="must name a key of the section"):
        load_config(str(home / "base.yaml"), [override])
