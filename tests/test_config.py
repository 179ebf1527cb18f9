"""Configuration: from YAML to options and back, and what is refused before anything is loaded."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from alignkit.config import (
    RunConfig,
    changed_keys,
    check,
    from_file,
    from_mapping,
    override,
    resolve_data_options,
    to_mapping,
)
from alignkit.errors import ConfigError
from alignkit.losses import GROUP_LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES
from alignkit.losses.divergences import DIVERGENCES
from alignkit.methods import DPO, KTO
from alignkit.options import (
    EarlyStop,
    GenerationOptions,
    ImageOptions,
    LoRA,
    TextOptions,
    TrainerOptions,
)
from alignkit.reference_options import (
    AdapterReference,
    EMAReference,
    PrecomputedReference,
    SyncedReference,
)
from alignkit.run_schema import json_schema

MINIMAL = {"policy": "some/model", "method": "dpo", "data": "pairs.jsonl"}
FULL = """
policy: some/model
method: {name: dpo, loss: sigmoid, beta: 0.2, label_smoothing: 1e-1}
data: pairs.jsonl
eval_data: {easy: easy.jsonl, hard: hard.jsonl}
reference: frozen
adapter: {rank: 8, alpha: 16, targets: [q_proj, v_proj], kind: dora}
data_options: {max_length: 64, columns: {prompt: question}}
generation: {stop: [END], temperature: 0}
trainer:
  epochs: 2
  learning_rate: 1e-5
  warmup: 10
  eval_every: 5
  early_stop: {metric: rewards/accuracies, patience: 2}
  trackers: [tensorboard]
run_dir: runs/x
resume: never
seed: 3
"""


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def run(**changes):
    return RunConfig(**{"policy": "some/model", "method": DPO(), "data": "pairs.jsonl"} | changes)


# --- reading -----------------------------------------------------------------------------------


def test_every_key_reaches_its_option(tmp_path):
    config = from_file(write(tmp_path, FULL))
    assert config == RunConfig(
        "some/model",
        DPO(loss="sigmoid", beta=0.2, label_smoothing=0.1),
        "pairs.jsonl",
        eval_data={"easy": "easy.jsonl", "hard": "hard.jsonl"},
        reference="frozen",
        adapter=LoRA(rank=8, alpha=16.0, targets=("q_proj", "v_proj"), kind="dora"),
        data_options={"max_length": 64, "columns": {"prompt": "question"}},
        generation=GenerationOptions(stop=("END",), temperature=0.0),
        trainer=TrainerOptions(
            epochs=2.0,
            learning_rate=1e-5,
            warmup=10,
            eval_every=5,
            early_stop=EarlyStop(metric="rewards/accuracies", patience=2),
            trackers=("tensorboard",),
        ),
        run_dir="runs/x",
        resume="never",
        seed=3,
    )
    assert isinstance(config.trainer.warmup, int)  # ten steps, not a share


def test_what_is_not_given_has_the_defaults_of_align():
    config = from_mapping(MINIMAL)
    assert config == RunConfig("some/model", DPO(), "pairs.jsonl")
    assert (config.reference, config.resume, config.seed) == ("auto", "auto", 0)
    assert from_mapping({**MINIMAL, "trainer": None, "generation": None}) == config


def test_a_number_as_text_is_a_number_where_one_is_expected():
    """YAML 1.1 readers, PyYAML among them, take 1e-5 for text."""
    assert yaml.safe_load("1e-5") == "1e-5"
    config = from_mapping({**MINIMAL, "trainer": {"learning_rate": "1e-5"}})
    assert config.trainer.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer": {"learning_rat": 1}},
            r"trainer\.learning_rat is not an option\. Did you mean 'learning_rate'\? Known: max_s",
        ),
        ({"trainr": {}}, r"trainr is not an option\. Did you mean 'trainer'\?"),
        (
            {"trainer": {"eval_every": 1, "early_stop": {"metric": "loss", "patienc": 1}}},
            r"trainer\.early_stop\.patienc is not an option\. Did you mean 'patience'\?",
        ),
        ({"adapter": {"rnk": 1}}, r"adapter\.rnk is not an option\. Did you mean 'rank'\?"),
        ({"data_options": {"max_lenght": 1}}, r"data_options\.max_lenght .* mean 'max_length'\?"),
        ({"generation": {"temprature": 1}}, r"generation\.temprature .* mean 'temperature'\?"),
        ({"method": {"name": "dbo"}}, r"Unknown method 'dbo'\. Did you mean 'dpo'\?"),
        ({"method": {"loss": "ipo"}}, r"method must be a name or a mapping with a name"),
        ({"method": {"name": "dpo", "beta": "x"}}, r"method\.beta must be a number or null; got"),
        ({"method": {"name": "dpo", "beta": -1}}, r"method\.beta must be a number above 0"),
        (
            {"trainer": {"batch_size": "many"}},
            r"trainer\.batch_size must be a whole number; got 'many' \(str\)",
        ),
        (
            {"trainer": {"batch_size": 2.5}},
            r"batch_size must be a whole number; got 2\.5 \(float\)",
        ),
        (
            {"trainer": {"batch_size": True}},
            r"batch_size must be a whole number; got True \(bool\)",
        ),
        ({"trainer": {"learning_rate": True}}, r"learning_rate must be a number or null; got True"),
        ({"trainer": {"learning_rate": float("nan")}}, r"learning_rate must be a number or null"),
        ({"trainer": {"compile": 1}}, r"trainer\.compile must be true or false; got 1 \(int\)"),
        ({"trainer": {"schedule": "cosin"}}, r"trainer\.schedule must be 'constant' or 'linear'"),
        ({"trainer": {"micro_batch": "many"}}, r"micro_batch must be a whole number or 'auto'"),
        ({"trainer": {"trackers": "wandb"}}, r"trainer\.trackers must be a list of text; got"),
        ({"trainer": {"trackers": [1]}}, r"trainer\.trackers\[0\] must be text; got 1"),
        ({"trainer": "adamw"}, r"trainer must be the options of TrainerOptions"),
        ({"trainer": {"batch_size": 0}}, r"trainer\.batch_size must be a number above 0; got 0"),
        (
            {"trainer": {"early_stop": {"patience": 1}}},
            r"trainer\.early_stop\.metric must be given",
        ),
        ({"data_options": {"columns": {"a": 1}}}, r"data_options\.columns\.a must be text; got 1"),
        ({"data_options": {"flip": "x"}}, r"data_options\.flip must be true or false; got 'x'"),
        ({"seed": "x"}, r"seed must be a whole number; got 'x'"),
        ({"policy": None}, r"policy must be given; add a line `policy: \.\.\.`"),
        (
            {"data": [{"prompt": "x"}]},
            r"data must be text or a mapping; got \[\{'prompt': 'x'\}\] \(list\)",
        ),
        ({"recipe": "instructgpt"}, r"A recipe is several runs.*; got 'instructgpt'"),
        ({"reference": {"ema": 0.9}}, r"reference as a mapping has a kind, such as"),
        ({"reference": {"kind": "emma"}}, r"Unknown reference\.kind 'emma'\. Did you mean 'ema'"),
        ({"reference": {"kind": "ema"}}, r"reference\.decay must be given"),
        ({"reference": {"kind": "ema", "decay": 1}}, r"reference\.decay must be below 1"),
        ({"reference": {"kind": "synced", "every": 2, "mix": 0}}, r"reference\.mix must be a numb"),
        ({"reference": {"kind": "synced", "every": 2, "mix": 2}}, r"reference\.mix must be betw"),
        ({"reference": {"kind": "precomputed", "table": 3}}, r"reference\.table is a mapping fr"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_path(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_mapping({**MINIMAL, **changes}, where="here.yaml")
    assert str(caught.value).startswith("here.yaml: ")


# --- files and overrides -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: a\n  data: b\n", r"run\.yaml, line 2, column 7: this is not valid YAML"),
        ("policy: a\npolicy: b\n", r"line 2, column 1: .* the key 'policy' is given twice"),
        ("trainer: {epochs: 1, epochs: 2}\n", r"line 1, column 22: .* 'epochs' is given twice"),
        ("- a\n- b\n", r"must hold a mapping with policy, method and data; got list"),
        ("", r"must hold a mapping with policy, method and data; got NoneType"),
        ("policy: a\nmethod: dpo\n", r"run\.yaml: data must be given"),
        ("policy: \x07\n", r"this is not valid YAML"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        from_file(write(tmp_path, text))


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no file .*none\.yaml"):
        from_file(tmp_path / "none.yaml")
    with pytest.raises(
        ConfigError, match=r"is a folder; name the YAML file, such as .*config\.yaml"
    ):
        from_file(tmp_path)


def test_yaml_merge_keys_are_no_duplicates(tmp_path):
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n"
    with pytest.raises(ConfigError, match="x is not an option"):
        from_file(write(tmp_path, text + yaml.safe_dump(MINIMAL)))


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1e-5", "1.0e-5", "1.e-5", ".1e-4"])
def test_exponents_are_numbers_also_where_no_type_is_known(tmp_path, text):
    config = from_file(write(tmp_path, FULL), [f"method.label_smoothing={text}"])
    assert config.method.keywords["label_smoothing"] == 1e-5


def test_text_that_only_looks_like_an_exponent_stays_text(tmp_path):
    assert from_file(write(tmp_path, FULL), ["run_dir=1e5x"]).run_dir == "1e5x"


def test_overrides_win_and_are_read_as_yaml(tmp_path):
    path = write(tmp_path, FULL)
    items = ["trainer.learning_rate=3e-4", "trainer.epochs=null", "trainer.max_steps=7"]
    items += [
        "adapter.targets=all",
        "generation.stop=[a, b]",
        "data=other.jsonl",
        "eval_data.new=n",
    ]
    config = from_file(path, items)
    assert config.trainer.learning_rate == 3e-4
    assert (config.trainer.epochs, config.trainer.max_steps) == (None, 7)
    assert config.adapter.targets == "all"
    assert config.generation.stop == ("a", "b")
    assert config.data == "other.jsonl"
    assert config.eval_data == {"easy": "easy.jsonl", "hard": "hard.jsonl", "new": "n"}
    assert config.trainer.warmup == 10  # beside them nothing changed


def test_overrides_make_the_sections_they_need():
    before = {**MINIMAL, "adapter": None, "trainer": {"batch_size": 8}}
    after = override(before, ["method.beta=0.5", "adapter.rank=4", "trainer.max_steps=1"])
    config = from_mapping(after)
    assert (config.method, config.adapter, config.trainer.max_steps) == (
        DPO(beta=0.5),
        LoRA(rank=4),
        1,
    )
    assert before["trainer"] == {"batch_size": 8}  # what was given is not changed
    assert before["method"] == "dpo"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("trainer.max_steps", r"written key\.sub=value; got 'trainer\.max_steps'"),
        ("=1", r"written key\.sub=value; got '=1'"),
        ("trainer..x=1", r"written key\.sub=value"),
        ("data.x=1", r"data\.x cannot be set: data is 'pairs\.jsonl'"),
        ("seed=[1", r"override 'seed=\[1'.*not valid YAML"),
        ("trainer.max_step=1", r"trainer\.max_step is not an option\. Did you mean 'max_steps'\?"),
    ],
)
def test_overrides_that_cannot_be_read_are_refused(tmp_path, item, message):
    with pytest.raises(ConfigError, match=message):
        from_file(write(tmp_path, FULL), [item])


# --- writing -----------------------------------------------------------------------------------


def test_a_written_configuration_reads_back_to_the_same_run(tmp_path):
    config = from_file(write(tmp_path, FULL))
    text = yaml.safe_dump(to_mapping(config))
    again = from_mapping(yaml.safe_load(text))
    assert to_mapping(again) == to_mapping(config)
    assert replace(again, data_options=None) == replace(config, data_options=None)
    json.dumps(to_mapping(config), allow_nan=False)


@pytest.mark.parametrize(
    "reference",
    [
        AdapterReference("other"),
        EMAReference(0.99, every=2),
        SyncedReference(5, mix=0.5),
        PrecomputedReference("table.jsonl"),
    ],
)
def test_references_with_options_read_back(reference):
    config = run(reference=reference)
    mapping = to_mapping(config)
    assert mapping["reference"]["kind"] == reference.kind
    assert from_mapping(yaml.safe_load(yaml.safe_dump(mapping))) == config


def test_every_field_is_written_defaults_included():
    mapping = to_mapping(run(adapter=LoRA(), data_options=TextOptions()))
    assert mapping["trainer"] == {**asdict(TrainerOptions()), "trackers": []}
    assert mapping["generation"] == {**asdict(GenerationOptions()), "stop": []}
    assert mapping["adapter"] == asdict(LoRA())
    assert mapping["data_options"]["truncation"] == "keep_start"
    assert mapping["method"] == {
        "name": "dpo",
        "loss": "sigmoid",
        "beta": None,
        "divergence": "reverse_kl",
        "divergence_alpha": 0.5,
        "weighting": None,
        "ld_alpha": None,
        "anchor": 0.0,
        "timestep_weighting": "uniform",
        "timesteps": None,
        "safeguard": None,
    }
    assert mapping["resume"] == "auto"


def test_what_a_run_adds_to_its_file_is_ignored():
    extra = {"environment": {"torch": "2"}, "resolved": {"beta": 0.1}}
    assert from_mapping({**MINIMAL, **extra}) == from_mapping(MINIMAL)


class PeftModel:
    pass


class FakeModel:
    pass


class Adapted:
    """A model with adapters of these names."""

    def __init__(self, *names):
        self.peft_config = dict.fromkeys(names)


def my_loss(scores, *, beta):
    return -beta * scores.margin


def test_objects_in_memory_are_named_and_cannot_be_run_from_a_file():
    config = run(
        policy=(FakeModel(), object()),
        method=DPO(loss=my_loss),
        data=[{"prompt": "x"}] * 3,
        reference=FakeModel(),
        eval_data={"a": "a.jsonl", "b": []},
        run_dir=Path("runs/x"),
    )
    mapping = to_mapping(config)
    assert mapping["policy"] == "<in memory: FakeModel>"
    assert mapping["reference"] == "<in memory: FakeModel>"
    assert mapping["method"]["loss"] == "<in memory: my_loss>"
    assert mapping["data"] == "<in memory: list of 3 rows>"
    assert mapping["run_dir"] == "runs/x"
    json.dumps(mapping)
    for name in ("policy", "reference", "data"):
        with pytest.raises(ConfigError, match=f"{name} is '<in memory: .* from objects in memory"):
            from_mapping({**MINIMAL, name: mapping[name]})
    with pytest.raises(ConfigError, match=r"method\.loss is '<in memory"):
        from_mapping({**MINIMAL, "method": mapping["method"]})


def test_numbers_of_other_libraries_are_written_as_plain_ones():
    import numpy as np

    options = TrainerOptions(max_steps=np.int64(3), learning_rate=np.float32(0.5))
    config = run(trainer=options)
    check(config)
    text = yaml.safe_dump(to_mapping(config))
    assert yaml.safe_load(text)["trainer"]["max_steps"] == 3
    assert yaml.safe_load(text)["trainer"]["learning_rate"] == 0.5


def test_changed_keys_are_the_leaves_that_matter():
    old = to_mapping(run(run_dir="a", trainer=TrainerOptions(trackers=("wandb",))))
    new = to_mapping(
        run(
            method=DPO(beta=0.2, label_smoothing=0.1),
            adapter=LoRA(),
            trainer=TrainerOptions(batch_size=8, push_to_hub="me/x"),
            run_dir="b",
            resume="never",
            seed=1,
        )
    )
    noise = {"environment": {"torch": "2"}, "resolved": {"beta": 1}}
    expected = ["adapter", "method.beta", "method.label_smoothing", "seed", "trainer.batch_size"]
    assert sorted(changed_keys(old | noise, new)) == expected
    assert sorted(changed_keys(new, old | noise)) == expected
    assert changed_keys(old | noise, old | {"environment": {"torch": "3"}}) == []


# --- modality ----------------------------------------------------------------------------------


def test_data_options_become_those_of_the_modality():
    text = from_mapping({**MINIMAL, "data_options": {"max_length": 64, "on_bad_row": "skip"}})
    assert resolve_data_options(text, "text") == TextOptions(max_length=64, on_bad_row="skip")
    with pytest.raises(
        ConfigError, match=r"data_options\.max_length is an option of text data only"
    ):
        resolve_data_options(text, "image")
    image = from_mapping({**MINIMAL, "data_options": {"flip": True}})
    assert resolve_data_options(image, "image") == ImageOptions(flip=True)
    with pytest.raises(ConfigError, match=r"data_options\.flip is an option of image data only"):
        check(image, "text")
    check(image)  # not known yet


def test_a_partial_mapping_changes_the_default_of_the_wing():
    default = ImageOptions(resolution=64, crop="random")
    config = from_mapping({**MINIMAL, "data_options": {"flip": True}})
    expected = ImageOptions(resolution=64, crop="random", flip=True)
    assert resolve_data_options(config, "image", default) == expected
    assert resolve_data_options(run(), "image", default) is default
    assert resolve_data_options(run(), "image") is None
    given = ImageOptions(ties="half")
    assert resolve_data_options(run(data_options=given), "image", default) is given


# --- combinations ------------------------------------------------------------------------------


def no_reference(scores, *, beta):
    return my_loss(scores, beta=beta)


SIGMOID = PREFERENCE_LOSSES["sigmoid"]
WITHOUT_REFERENCE = replace(SIGMOID, name="free", needs_reference=False)
NOT_SCALE_FREE = replace(SIGMOID, name="fixed", scale_free=False)


@pytest.mark.parametrize(
    ("changes", "modality", "message"),
    [
        ({"method": "dpo"}, None, r"method must be one of DPO\(\), KTO\(\), SFT\(\).*; got 'dpo'"),
        ({"method": DPO}, None, r"method must be one of DPO\(\), KTO\(\), SFT\(\).*; got <class"),
        (
            {"method": KTO(), "trainer": TrainerOptions(batch_size=1)},
            "text",
            r"mismatched answers of the global batch.*got trainer\.batch_size=1",
        ),
        ({"policy": None}, None, "policy must be given"),
        ({"data": None}, None, "data must be given"),
        ({"adapter": {"rank": 4}}, None, "adapter must be the options of LoRA or null"),
        ({"trainer": {"max_steps": 1}}, None, "trainer must be the options of TrainerOptions"),
        ({"trainer": TrainerOptions(schedule="cosin")}, None, r"trainer\.schedule must be 'const"),
        ({"generation": GenerationOptions(engine="tgi")}, None, r"'transformers' or 'vllm'"),
        ({"seed": "1"}, None, "seed must be a whole number"),
        ({"reward": len}, None, r"reward is used by online methods.*Leave reward out"),
        ({"judge": len}, None, r"judge is used by online methods.*Leave judge out"),
        ({"method": DPO(loss="sigmod")}, None, r"Unknown loss 'sigmod'\. Did you mean 'sigmoid'\?"),
        (
            {"method": DPO(label_smothing=0.1)},
            None,
            r"no option 'label_smothing'\. Did you mean 'label_smoothing'\?",
        ),
        (
            {"method": DPO(label_smoothing="a")},
            None,
            r"method\.label_smoothing must be a number; got 'a'",
        ),
        (
            {"method": DPO(label_smoothing="0.1")},
            None,
            r"method\.label_smoothing must be a number; got '0\.1'",
        ),
        ({"method": DPO(loss="ipo", average=1)}, None, r"method\.average must be true or false"),
        (
            {"method": DPO(label_smoothing=0.7)},
            None,
            r"label_smoothing of .sigmoid. must be in \[0, 0\.5\]",
        ),
        ({"method": DPO(loss="robust", label_smoothing=0.5)}, None, r"in \[0, 0\.5\); got 0\.5"),
        ({"method": DPO(loss=my_loss, e=1)}, None, r"called as loss\(scores, beta=\.\.\., e="),
        ({"method": DPO(loss=NOT_SCALE_FREE)}, "image", "Loss 'fixed' is not a function of beta"),
        ({"reference": "none"}, None, r"Loss 'sigmoid' compares .* Write reference='auto'"),
        (
            {"method": DPO(loss=WITHOUT_REFERENCE), "reference": "frozen"},
            None,
            "Loss 'free' uses no reference; got reference='frozen'",
        ),
        ({"reference": "adapter_off"}, None, "has none; got adapter=None"),
        (
            {"reference": "adapter_off", "policy": (FakeModel(), 0)},
            None,
            "has none; got adapter=None",
        ),
        ({"reference": "frozn"}, None, r"Unknown reference 'frozn'\. Did you mean 'frozen'\?"),
        ({"reference": None}, None, r"reference must be 'auto', .*one of AdapterReference"),
        ({"reference": AdapterReference("x")}, None, "the policy carries none"),
        (
            {"reference": AdapterReference("x"), "policy": (Adapted("default", "y"), 0)},
            None,
            r"Unknown adapter of the policy 'x'\. .*Known: default, y",
        ),
        (
            {
                "reference": AdapterReference("x"),
                "policy": (Adapted("default", "x"), 0),
                "adapter": LoRA(),
            },
            None,
            "carries default, x, and a new one is asked for",
        ),
        ({"reference": PrecomputedReference({})}, "image", "for text policies: an image's"),
        (
            {"reference": PrecomputedReference({}), "eval_data": "x.jsonl"},
            "text",
            "those of eval_data would be taken for them",
        ),
        (
            {"reference": PrecomputedReference("no/file.jsonl")},
            "text",
            r"reference\.table must be a file that exists; got 'no/file\.jsonl'",
        ),
        ({"reference": EMAReference(0.9, every=1.5)}, None, r"reference\.every must be a whole"),
        ({"data_options": TextOptions()}, "image", "must be ImageOptions; got TextOptions"),
        ({"data_options": {"flop": True}}, None, r"data_options\.flop is not an option"),
        ({"data_options": {"flip": 3}}, "image", r"data_options\.flip must be true or false"),
        (
            {"generation": GenerationOptions(steps=5)},
            "text",
            r"generation\.steps is an option of im",
        ),
        (
            {"generation": GenerationOptions(top_k=5)},
            "image",
            r"generation\.top_k is an option of te",
        ),
        ({"trainer": TrainerOptions(eval_every=5)}, None, r"eval_every=5 evaluates on eval_data"),
        ({"trainer": TrainerOptions(sharding="fsdp2")}, "image", "fsdp2' is for text policies"),
        ({"trainer": TrainerOptions(push_to_hub="x")}, None, "Write push_to_hub='your-name/x'"),
        ({"trainer": TrainerOptions(push_to_hub="me/x")}, None, "of the run; got run_dir=None"),
        (
            {"trainer": TrainerOptions(push_to_hub="me/x"), "run_dir": "runs/x"},
            None,
            r"uploads the model at the end, and the hub is switched off \(HF_HUB_OFFLINE\)",
        ),
        (
            {"trainer": TrainerOptions(trackers=("tensorbord",))},
            None,
            r"Unknown tracker 'tensorbord'\. Did you mean 'tensorboard'\?",
        ),
        ({"eval_data": {}}, None, "must name at least one set"),
        (
            {"trainer": TrainerOptions(eval_every=1, keep_best="loss"), "eval_data": "x.jsonl"},
            None,
            r"keep_best follows .* begins with 'eval/'; got 'loss'\. Write 'eval/loss'",
        ),
        (
            {
                "trainer": TrainerOptions(eval_every=1, early_stop=EarlyStop("eval/loss")),
                "eval_data": {"a": "x.jsonl", "b": "y.jsonl"},
            },
            None,
            r"early_stop\.metric follows .* 'eval/a/' or 'eval/b/'.* Write 'eval/a/loss'",
        ),
        (
            {"adapter": LoRA(), "policy": (PeftModel(), 0)},
            None,
            "The policy already carries an adapter",
        ),
        ({"resume": "maybe"}, None, r"resume must be 'auto', .*got 'maybe', and there is no such"),
        ({"resume": "must"}, None, "resume='must' continues a run in its folder; got run_dir=None"),
        ({"resume": Path(__file__)}, None, "continues a run in its folder; got run_dir=None"),
        (
            {"trainer": TrainerOptions(save_every=1)},
            None,
            r"save_every=1 writes into the run folder",
        ),
        ({"trainer": TrainerOptions(sample_every=1)}, None, r"sample_every=1 writes into the run"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, modality, message):
    with pytest.raises(ConfigError, match=message):
        check(run(**changes), modality)


@pytest.mark.parametrize(
    ("changes", "modality"),
    [
        ({}, None),
        ({}, "text"),
        ({}, "image"),
        ({"reference": "adapter_off", "adapter": LoRA()}, "text"),
        ({"reference": "gpt2"}, "text"),
        ({"reference": "my/frozen"}, "text"),
        ({"reference": FakeModel()}, "text"),
        ({"eval_data": "x.jsonl"}, "text"),
        ({"eval_data": "x.jsonl", "trainer": TrainerOptions(eval_every=1)}, "text"),
        ({"method": DPO(loss=my_loss)}, "image"),
        ({"method": DPO(loss=no_reference), "reference": "none"}, "text"),
        ({"method": DPO(loss=WITHOUT_REFERENCE), "reference": "none"}, "text"),
        ({"method": DPO(loss=NOT_SCALE_FREE)}, "text"),
        ({"method": DPO(loss="ipo", average=False)}, "text"),
        ({"method": DPO(label_smoothing=0)}, "text"),
        ({"data_options": TextOptions(packing="bucket")}, "text"),
        ({"generation": GenerationOptions(steps=5)}, "image"),
        ({"trainer": TrainerOptions(sharding="fsdp2")}, "text"),
        ({"run_dir": "runs/x", "resume": "must", "trainer": TrainerOptions(save_every=1)}, "text"),
        ({"run_dir": Path("runs/x"), "resume": Path(__file__)}, "text"),
    ],
)
def test_what_goes_together_is_let_through(changes, modality):
    check(run(**changes), modality)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    given = run(trainer=TrainerOptions(trackers=("tensorboard",)))
    with pytest.raises(ConfigError, match=r"the package of 'tensorboard' is not installed"):
        check(given)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["tensorboard"])
    with pytest.raises(ConfigError, match=r"'tensorboard' writes into the run folder"):
        check(given)
    check(replace(given, run_dir="runs/x"))


def test_pushing_needs_somebody_logged_in(monkeypatch):
    given = run(trainer=TrainerOptions(push_to_hub="me/x"), run_dir="runs/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="and nobody is logged in to the hub"):
        check(given)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    check(given)


def test_adapter_off_is_let_through_for_a_policy_that_brings_its_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    check(run(policy=str(tmp_path), reference="adapter_off"))
    model = FakeModel()
    model.peft_config = {"default": 1}
    check(run(policy=(model, 0), reference="adapter_off"))
    pipeline = FakeModel()
    pipeline.unet = model
    check(run(policy=pipeline, reference="adapter_off"), "image")


def test_hardware_that_is_not_there_is_refused(monkeypatch):
    import torch

    from alignkit.checks import trainer as trainer_checks

    half = run(trainer=TrainerOptions(precision="fp16"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"fp16' needs a GPU.*Write precision='fp32' or 'bf16'"):
        check(half)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check(half)

    small = run(trainer=TrainerOptions(optimizer="adamw_8bit"))
    monkeypatch.setattr(trainer_checks, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"bitsandbytes, which is not installed\. Run pip install"
    ):
        check(small)
    monkeypatch.setattr(trainer_checks, "find_spec", lambda name: "found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="adamw_8bit' needs a CUDA GPU"):
        check(small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(small)


# --- the schema --------------------------------------------------------------------------------


def keys(schema):
    """Dotted paths of all properties of a JSON schema."""
    for name, inner in schema.get("properties", {}).items():
        yield name
        for part in (inner, *inner.get("anyOf", ())):
            yield from (f"{name}.{key}" for key in keys(part))


def test_the_schema_has_every_key_that_is_read(tmp_path):
    known = set(keys(json_schema()))
    written = to_mapping(from_file(write(tmp_path, FULL)))
    assert set(written) <= known
    for section in ("adapter", "generation", "trainer", "method", "data_options"):
        assert {f"{section}.{key}" for key in written[section]} <= known
    assert {"environment", "resolved", "trainer.early_stop.patience"} <= known
    assert {"data_options.flip", "data_options.truncation"} <= known
    losses = {key for loss in PREFERENCE_LOSSES.values() for key in loss.keywords}
    assert {f"method.{key}" for key in losses} <= known


def test_the_schema_says_what_editors_show():
    schema = json_schema()
    assert schema["required"] == ["policy", "method", "data"]
    assert schema["additionalProperties"] is False
    trainer = schema["properties"]["trainer"]["anyOf"][0]
    assert trainer["additionalProperties"] is False
    assert trainer["properties"]["schedule"] == {
        "enum": ["constant", "linear", "cosine"],
        "default": "linear",
    }
    batch_size = trainer["properties"]["batch_size"]
    assert (batch_size["type"], batch_size["default"]) == ("integer", 64)
    assert batch_size["description"].startswith("examples (pairs, groups) one optimizer step sees")
    assert trainer["properties"]["warmup"]["type"] == "number"
    assert trainer["properties"]["learning_rate"]["type"] == ["number", "null"]
    method = schema["properties"]["method"]["anyOf"][1]
    names = [*PREFERENCE_LOSSES, *GROUP_LOSSES]
    assert method["properties"]["loss"]["anyOf"][0] == {"enum": names}
    assert list(method["properties"]["loss"]["anyOf"][1]["properties"]) == names
    assert method["properties"]["divergence"]["enum"] == list(DIVERGENCES)
    assert method["required"] == ["name"]
    kto = schema["properties"]["method"]["anyOf"][2]
    assert kto["properties"]["name"] == {"enum": ["kto"]}
    assert kto["properties"]["loss"]["enum"] == list(UNPAIRED_LOSSES)
    assert kto["properties"]["momentum"]["type"] == "number"
