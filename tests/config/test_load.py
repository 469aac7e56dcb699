"""What load_config accepts, and the exact error lines for what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.config.data import ReasoningGymSource
from megarl.config.evaluate import EvalConfig
from megarl.config.foreign_names import _SETTINGS
from megarl.config.grpo import GrpoConfig
from megarl.config.introspect import walk
from megarl.config.load import dump_config, load_config
from megarl.config.section import Section
from megarl.config.sft import SftConfig
from megarl.errors import UserError
from megarl.jobs import roots

SOURCES = "'reasoning_gym' or 'jsonl' or 'file' or 'hf' or 'benchmark' or 'mixture' or 'environment'"
GRPO = """\
run:
  dir: runs/x
model:
  path: models/m
optimizer:
  lr: 1e-5
data:
  train:
    source: reasoning_gym
    task: chain_sum
    size: 100
    seed: 0
  held_out:
    source: reasoning_gym
    task: chain_sum
    size: 50
    seed: 200
rollout:
  num_prompts_per_step: 8
  num_generations_per_prompt: 4
  max_new_tokens: 16
evaluation:
  num_prompts: 50
training:
  num_steps: 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grpo(folder: Path, *overrides: str, text: str = GRPO) -> GrpoConfig:
    (folder / "c.yaml").write_text(text)
    return load_config(GrpoConfig, "c.yaml", overrides, check_files=False)


def errors(folder: Path, *overrides: str, text: str = GRPO, kind: type[Section] = GrpoConfig) -> list[str]:
    (folder / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(kind, "c.yaml", overrides, check_files=False)
    return str(caught.value).splitlines()


def test_numbers_of_yaml_1_2_and_integers_for_floats(folder: Path) -> None:
    assert grpo(folder).optimizer.lr == 1e-5
    lr = grpo(folder, "optimizer.lr=2").optimizer.lr
    assert lr == 2.0
    assert isinstance(lr, float)


def test_round_trip_of_every_field(folder: Path) -> None:
    config = grpo(
        folder,
        "data.train.arguments={ops: ['+', 'on', '1e5', '007', '$${X}', null, true], deep: {a: 1.0}}",
        'data.format.prompt_suffix="\\nThe answer: # $${X}\\t"',
        "logging.wandb.project=1e5",
        "optimizer.adam_eps=1e-30",
        "packing.max_sequence_length=512",
        "run.dir=~~",
    )
    assert isinstance(config.data.train, ReasoningGymSource)
    assert config.data.train.arguments["ops"] == ["+", "on", "1e5", "007", "${X}", None, True]
    assert config.data.format.prompt_suffix == "\nThe answer: # ${X}\t"
    assert config.run.dir == "~~"
    assert grpo(folder, text=dump_config(config)) == config


def test_typed_overrides(folder: Path) -> None:
    config = grpo(
        folder,
        "run.dir=2024",  # a string field takes the text as it stands
        "data.train.arguments.min_terms=3",
        "data.train.arguments.nested.x=1e-3",
        "checkpoint.export_hf=false",
        "data.held_out={source: jsonl, path: a b.jsonl}",
        "evaluation.num_prompts=7",
        "logging.wandb=null",
        "optimizer.lr=1e-3",
        "optimizer.lr=1e-4",
    )
    assert config.run.dir == "2024"
    assert isinstance(config.data.train, ReasoningGymSource)
    assert config.data.train.arguments == {"min_terms": 3, "nested": {"x": 0.001}}
    assert config.checkpoint.export_hf is False
    assert config.data.held_out is not None
    assert config.data.held_out.source == "jsonl"
    assert config.logging.wandb is None
    assert config.optimizer.lr == 1e-4


def test_string_override_equal_sign_colon_and_quotes(folder: Path) -> None:
    assert grpo(folder, "data.format.prompt_suffix= a=b: [c").data.format.prompt_suffix == " a=b: [c"
    assert grpo(folder, 'data.format.prompt_suffix="x\\ny"').data.format.prompt_suffix == "x\ny"
    assert grpo(folder, "data.format.system_prompt=null").data.format.system_prompt is None
    assert grpo(folder, "data.format.system_prompt='null'").data.format.system_prompt == "null"


def test_override_mends_what_the_file_got_wrong(folder: Path) -> None:
    text = GRPO.replace("path: models/m", "path: ${MEGARL_TEST_UNSET}").replace("lr: 1e-5", "lr: fast")
    config = grpo(folder, "model.path=models/n", "optimizer.lr=1", text=text)
    assert (config.model.path, config.optimizer.lr) == ("models/n", 1.0)


def test_environment_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_TEST_ROOT", "/data")
    monkeypatch.setenv("MEGARL_TEST_STEPS", "12")
    monkeypatch.delenv("MEGARL_TEST_UNSET", raising=False)
    text = (
        GRPO.replace("models/m", "${MEGARL_TEST_ROOT}/m-${MEGARL_TEST_UNSET:-small}")
        .replace("num_steps: 3", "num_steps: ${MEGARL_TEST_STEPS}")
        .replace("runs/x", "'$${literal} ${MEGARL_TEST_STEPS}'")
    )
    config = grpo(folder, text=text)
    assert config.model.path == "/data/m-small"
    assert config.training.num_steps == 12
    assert config.run.dir == "${literal} 12"


def test_environment_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGARL_TEST_UNSET", raising=False)
    text = GRPO.replace("models/m", "${MEGARL_TEST_UNSET}").replace("runs/x", "a${b c}")
    assert errors(folder, text=text) == [
        "run.dir: '${' does not start ${NAME} or ${NAME:-default}; write $${ for a literal ${ [c.yaml:2]",
        "model.path: environment variable MEGARL_TEST_UNSET is not set [c.yaml:4]",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("  lr: 1e-5", "  lr: '1e-5'", "optimizer.lr: expected a number > 0 (got '1e-5') [c.yaml:6]"),
        ("  lr: 1e-5", "  lr: -1", "optimizer.lr: expected a number > 0 (got -1) [c.yaml:6]"),
        ("  lr: 1e-5", "  lr: .inf", "optimizer.lr: expected a number > 0 (got inf) [c.yaml:6]"),
        ("  lr: 1e-5", "  lr: true", "optimizer.lr: expected a number > 0 (got true) [c.yaml:6]"),
        ("  lr: 1e-5", "  lr:", "optimizer.lr: expected a number > 0 (got null) [c.yaml:6]"),
        ("  lr: 1e-5", "  lr: [1]", "optimizer.lr: expected a number > 0 (got a list) [c.yaml:6]"),
        (
            "  lr: 1e-5",
            "  lr_warmup_steps: 0",
            "optimizer.lr: required but missing: a number > 0. Peak learning rate. [c.yaml:5]",
        ),
        (
            "  num_steps: 3",
            "  num_steps: 3.0",
            "training.num_steps: expected an integer >= 1 (got 3.0) [c.yaml:25]",
        ),
        ("  dir: runs/x", "  dir: 7", "run.dir: expected a string (not empty) (got 7) [c.yaml:2]"),
        ("  dir: runs/x", "  dir: ''", "run.dir: expected a string (not empty) (got '') [c.yaml:2]"),
        (
            "    seed: 0",
            "    arguments: 3",
            "data.train.arguments: expected a mapping (got 3) [c.yaml:12]",
        ),
        (
            "    source: reasoning_gym\n    task: chain_sum\n    size: 100",
            "    source: gym",
            f"data.train.source: expected {SOURCES} (got 'gym') [c.yaml:9]",
        ),
        (
            "    source: reasoning_gym\n    task: chain_sum\n    size: 100",
            "    size: 100",
            f"data.train.source: required but missing: {SOURCES} [c.yaml:8]",
        ),
        (
            "  held_out:\n    source: reasoning_gym\n    task: chain_sum\n    size: 50\n    seed: 200",
            "  held_out: 5",
            f"data.held_out: expected a section with source {SOURCES} or null (got 5) [c.yaml:13]",
        ),
        ("optimizer:\n  lr: 1e-5", "optimizer: 1e-5", "optimizer: expected a section (got 1e-05) [c.yaml:5]"),
    ],
)
def test_one_wrong_value(folder: Path, old: str, new: str, line: str) -> None:
    assert old in GRPO
    assert errors(folder, text=GRPO.replace(old, new, 1)) == [line]


@pytest.mark.parametrize(
    ("addition", "line"),
    [
        ("lr: 1", "lr: unknown key; did you mean optimizer.lr? [c.yaml:26]"),
        ("max_new_tokns: 1", "max_new_tokns: unknown key; did you mean rollout.max_new_tokens? [c.yaml:26]"),
        (
            "checkpoints: {}",
            "checkpoints: unknown key; did you mean checkpoint? [c.yaml:26]",
        ),
        (
            "parallel: {tensor-parallel-size: 2}",
            "parallel.tensor-parallel-size: unknown key; did you mean "
            "parallel.tensor_parallel_size? [c.yaml:26]",
        ),
        (
            "packing: {kl_coef: 2}",
            "packing.kl_coef: unknown key; did you mean algorithm.kl_coef? [c.yaml:26]",
        ),
        (
            "packing: {zzz: 2}",
            "packing.zzz: unknown key; valid here: max_tokens_per_microbatch, "
            "max_sequence_length, share_prefix [c.yaml:26]",
        ),
    ],
)
def test_unknown_key(folder: Path, addition: str, line: str) -> None:
    assert errors(folder, text=GRPO + addition + "\n") == [line]


def test_an_unknown_section_of_the_command_line(folder: Path) -> None:
    lines = errors(folder, "trainig.num_steps=3")
    assert lines == ["trainig: unknown key; did you mean training? [command line]"]


def test_names_that_other_tools_have(folder: Path) -> None:
    """Only settings of this command are named."""
    expected = {
        "learning_rate": "optimizer.lr",
        "optimizer.warmup_steps": "optimizer.lr_warmup_steps",
        "algorithm.num_generations": "rollout.num_generations_per_prompt",
        "eval_steps": "evaluation.interval",
        "per_device_train_batch_size": "rollout.num_prompts_per_step",
    }
    assert sorted(errors(folder, *(f"{name}=1" for name in expected))) == sorted(
        f"{name}: unknown key; here it is {here} [command line]" for name, here in expected.items()
    )


def test_foreign_names_lead_to_settings_and_shadow_none() -> None:
    settings = {path for root in roots().values() for path in map(".".join, walk(root))}
    assert _SETTINGS.keys() <= settings
    ours = {path.rpartition(".")[2] for path in settings}
    shadowed = {name for names in _SETTINGS.values() for name in names.split()} & ours
    assert shadowed == {"warmup_steps"}  # critic's, which is not the learning rate's


def test_unknown_key_of_another_source_or_command(folder: Path) -> None:
    assert errors(folder, "data.train.path=x", "training.batch_size=3") == [
        "data.train.path: unknown key here; it belongs to source jsonl [command line]",
        "training.batch_size: unknown key here; it is a setting of megarl sft, dpo, rm [command line]",
    ]


def test_a_grpo_file_given_to_sft(folder: Path) -> None:
    lines = errors(folder, kind=SftConfig)
    assert (
        "rollout: unknown key here; it is a setting of megarl grpo, ppo, distill, eval [c.yaml:18]" in lines
    )
    assert (
        "evaluation: unknown key here; it is a setting of megarl grpo, ppo, distill, eval [c.yaml:22]"
        in lines
    )
    assert (
        "training.batch_size: required but missing: an integer >= 1. Sequences per optimizer step, over "
        "all ranks. [c.yaml:24]" in lines
    )


def test_missing_sections(folder: Path) -> None:
    lines = errors(folder, text="run: {dir: x}\n", kind=EvalConfig)
    assert lines == [
        "model: required but missing: a section. The model to train. It needs model.path. [c.yaml]",
        "data: required but missing: a section. Prompts for evaluation. It needs data.held_out. [c.yaml]",
        "rollout: required but missing: a section. Generation, for training and evaluation. It needs "
        "rollout.max_new_tokens. [c.yaml]",
    ]


def test_bad_overrides(folder: Path) -> None:
    assert errors(folder, "optimizer.lr", "optimizer..lr=1", "=1") == [
        "optimizer.lr: an override has the form section.key=value (got 'optimizer.lr') [command line]",
        "optimizer..lr=1: an override has the form section.key=value (got 'optimizer..lr=1') [command line]",
        "=1: an override has the form section.key=value (got '=1') [command line]",
    ]
    assert errors(folder, "optimizer.lr=fast") == [
        "optimizer.lr: expected a number > 0 (got 'fast') [command line]"
    ]
    assert errors(folder, "run.dir.x=1") == [
        "run.dir.x: run.dir is a value, not a section (got 'runs/x') [command line]"
    ]
    (line,) = errors(folder, "optimizer.lr={a: ")
    assert line.startswith("optimizer.lr: not valid YAML: ")
    assert line.endswith("(got '{a: ') [command line]")


def test_everything_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = (
        GRPO.replace("dir: runs/x", "dri: runs/x")
        .replace("lr: 1e-5", "lr: x")
        .replace("size: 50", "size: 20")
    )
    assert errors(folder, "parallel.num_processes=3", "parallel.tensor_parallel_size=2", text=text) == [
        "run.dir: required but missing: a string (not empty). Run directory; the same command run again "
        "resumes from it. [c.yaml:1]",
        "run.dri: unknown key; did you mean run.dir? [c.yaml:2]",
        "optimizer.lr: expected a number > 0 (got 'x') [c.yaml:6]",
        "evaluation.num_prompts: more than the held-out set has, data.held_out.size = 20 (got "
        "50) [c.yaml:23]",
        "parallel.num_processes: must be a multiple of tensor_parallel_size * pipeline_parallel_size * "
        "context_parallel_size = 2 (got 3) [command line]",
    ]


def test_duplicate_keys_and_other_keys_that_cannot_be(folder: Path) -> None:
    text = GRPO + "training: {num_steps: 4}\nlogging: {1: x, tensorboard: !!python/name:os.system ''}\n"
    assert errors(folder, text=text) == [
        "training: given twice, first on line 24 [c.yaml:26]",
        "logging.1: keys must be strings; put it in quotes [c.yaml:27]",
        "logging.tensorboard: unknown YAML tag tag:yaml.org,2002:python/name:os.system [c.yaml:27]",
    ]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("run: {dir: x\nmodel: 3\n", "c.yaml:2: not valid YAML: "),
        ("run:\n\tdir: x\n", "c.yaml:2: not valid YAML: "),
        ("a: *nowhere\n", "c.yaml:1: not valid YAML: "),
        ("a: 1\n---\nb: 1\n", "c.yaml:2: not valid YAML: "),
        ("a: \x00\n", "c.yaml: not valid YAML: "),
        ("- 1\n", "c.yaml: a configuration must be a mapping of sections (got a list)"),
        ("hello\n", "c.yaml: a configuration must be a mapping of sections (got 'hello')"),
    ],
)
def test_not_a_configuration(folder: Path, text: str, start: str) -> None:
    (line,) = errors(folder, text=text)
    assert line.startswith(start)


def test_recursive_alias(folder: Path) -> None:
    assert "run.dir: an alias (*) inside its own anchor (&) [c.yaml:1]" in errors(
        folder, text="run: &a {dir: *a}\n"
    )


def test_aliases_are_read(folder: Path) -> None:
    text = GRPO.replace("    seed: 0", "    seed: 0\n    arguments: &arguments {min_digits: 1}")
    text = text.replace("    seed: 200", "    seed: 200\n    arguments: *arguments")
    held_out = grpo(folder, text=text).data.held_out
    assert isinstance(held_out, ReasoningGymSource)
    assert held_out.arguments == {"min_digits": 1}


def test_unreadable_file(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(GrpoConfig, "none.yaml")
    assert str(caught.value) == "none.yaml: cannot read the configuration: No such file or directory"
    (folder / "latin.yaml").write_bytes(b"run: \xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml: not a UTF-8 text file"):
        load_config(GrpoConfig, "latin.yaml")


def test_empty_file_lists_what_is_required(folder: Path) -> None:
    lines = errors(folder, text="# nothing\n")
    assert [line.split(":")[0] for line in lines] == [
        "run",
        "model",
        "optimizer",
        "data",
        "rollout",
        "training",
    ]


def test_world_size_replaces_num_processes(folder: Path) -> None:
    (folder / "c.yaml").write_text(GRPO)
    config = load_config(GrpoConfig, "c.yaml", check_files=False, num_processes=4)
    assert config.parallel.num_processes == 4
    with pytest.raises(UserError) as caught:
        load_config(
            GrpoConfig, "c.yaml", ["parallel.tensor_parallel_size=3"], check_files=False, num_processes=4
        )
    assert str(caught.value).endswith("= 3 (got 4) [WORLD_SIZE]")


def test_a_tag_that_its_text_does_not_fit(folder: Path) -> None:
    (line,) = errors(folder, text=GRPO.replace("lr: 1e-5", "lr: !!float fast"))
    assert line == "optimizer.lr: !!float on what is none (got 'fast') [c.yaml:6]"


@pytest.mark.parametrize(("text", "value"), [("false", False), ("true", True), ("a.jinja", "a.jinja")])
def test_a_key_that_takes_a_boolean_or_a_text(text: str, value: bool | str) -> None:
    """true and false are the booleans there, on the command line as in a file."""
    given = ["run.dir=a", "model.path=b", "optimizer.lr=1", "training.num_steps=1", "training.batch_size=1"]
    given += ["data.train={source: jsonl, path: c}", f"data.format.chat_template={text}"]
    found = load_config(SftConfig, None, given, check_files=False).data.format.chat_template
    assert found == value and type(found) is type(value)
