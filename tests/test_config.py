import re
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import tiny_autoencoder_config, tiny_network_config

from pyramid_ldm.config import (
    AutoencoderConfig,
    AutoencoderTraining,
    FlowTraining,
    NCSNppConfig,
    load_config,
    load_saved,
    save_config,
)
from pyramid_ldm.config.autoencoder import EncoderConfig
from pyramid_ldm.config.base import differences, to_yaml
from pyramid_ldm.config.fixed import FIXED, kind_of
from pyramid_ldm.config.schema import element, leaves, optional
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import Level

ROOT = Path(__file__).parent.parent
AUTOENCODER = """
run_dir: runs/a
image_size: [32, 64]
model:
  levels: [{factor: 16, channels: 6}, {factor: 8, channels: 4}]
  encoder: {widths: [8, 8, 8, 8, 8]}
  decoder: {widths: [8, 8, 8, 8, 8]}
data: {root: photos}
"""
FLOW = "run_dir: runs/f\ndata: {shards: latents}\n"


@pytest.fixture
def load(tmp_path):
    def load(*overrides, text=AUTOENCODER, schema=AutoencoderTraining):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(schema, path, overrides)

    return load


@pytest.fixture
def refusal(load):
    """The one line that a wrong config earns."""

    def refusal(*overrides, **kwargs):
        with pytest.raises(UserError) as caught:
            load(*overrides, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refusal


def test_values_come_from_the_file_then_from_arguments_then_from_defaults(load):
    config = load("train.images=7", "model.levels=[{factor: 16, channels: 5}]", "data.flip=false")
    assert (config.run_dir, config.data.root, config.image_size) == ("runs/a", "photos", [32, 64])
    assert (config.train.images, config.data.flip) == (7, False)
    assert [(level.factor, level.channels) for level in config.model.levels] == [(16, 5)]
    assert config.train.batch_size == 4
    assert isinstance(config.train.learning_rate, float)
    assert load("train.images=7", "train.images=8").train.images == 8, "the last one counts"


def test_text_is_taken_as_it_is_and_numbers_are_decimal(load):
    """YAML makes 8 of 0010, 4096 of 010000, and sees a comment after ' #'."""
    literal = ["set #2", "0010", "a: b", "[1, 2]", "null", "true", "1e3", " x ", "'quoted'", "${run_dir}", "é\\$"]
    for text in literal:
        config = load(f"data.root={text}", f"run_dir={text}")
        assert (config.data.root, config.run_dir) == (text, text)
    assert load("train.images=010000").train.images == 10_000
    assert load("train.images=1_000").train.images == 1_000
    assert load("train.images=2e3").train.images == 2_000
    assert load("train.learning_rate=010").train.learning_rate == 10
    in_a_file = AUTOENCODER.replace("runs/a", "0010") + "train: {images: 010_000, learning_rate: 1e-5}\n"
    config = load(text=in_a_file)
    assert (config.run_dir, config.train.images, config.train.learning_rate) == ("0010", 10_000, 1e-5)
    assert load(text=AUTOENCODER.replace("runs/a", "runs/${image_size[0]}")).run_dir == "runs/32"


def test_a_leading_tilde_is_the_users_home(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("data.root=~/photos", "run_dir=~/runs/a", "loss.perceptual.weights=~/vgg.pth")
    assert config.data.root == "/home/me/photos"
    assert (config.run_dir, config.loss.perceptual.weights) == ("/home/me/runs/a", "/home/me/vgg.pth")


def test_a_key_that_stands_twice_is_refused(refusal):
    assert "the key run_dir stands twice" in refusal(text=AUTOENCODER + "run_dir: other\n")


def test_attention_factors_are_resolved_from_the_image_size(load):
    # 32x64 has 2048 positions, then 512, 128, 32, 8
    assert load("model.attention.max_tokens=128").model.attention.factors == [4, 8, 16]
    assert load("model.attention.max_tokens=7").model.attention.factors == []
    assert load("model.attention.factors=[16]").model.attention.factors == [16]
    # latents of factor 8 for 256x256 have 1024 positions
    flow = tiny_network_config((256, 256), ((16, 6), (8, 4)), attention_tokens=256)
    assert flow.attention_factors == [16]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trian.images", "train.images"),
        ("train.imges", "train.images"),
        ("batch_size", "train.batch_size"),
        ("model.atention.decoder", "model.attention.decoder"),
        ("loss.gan.wieght", "loss.gan.weight"),
        ("max_tokens", "model.attention.max_tokens"),
        ("runs_dir", "run_dir"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(refusal, key, nearest):
    assert refusal(f"{key}=3") == f"{key}=3: unknown key '{key}'; did you mean '{nearest}'?"


def test_an_unknown_key_in_the_file_names_the_file_and_the_key(refusal):
    message = refusal(text=AUTOENCODER + "trian: {images: 3}\n")
    assert message.endswith("config.yaml: unknown key 'trian.images'; did you mean 'train.images'?")
    message = refusal(text=AUTOENCODER + "batch_size: 3\n")
    assert message.endswith("config.yaml: unknown key 'batch_size'; did you mean 'train.batch_size'?")


def test_a_key_like_no_other_suggests_nothing(refusal):
    assert refusal("zzz=3") == "zzz=3: unknown key 'zzz'"


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.images", "many"), ("train.images", "1.5"), ("train.learning_rate", "fast"), ("data.flip", "maybe")],
)
def test_a_wrong_type_names_key_and_value(refusal, key, value):
    message = refusal(f"{key}={value}")
    assert message.startswith(f"{key}={value}: {key} is ")
    assert f"'{value}'" in message


def test_a_wrong_type_in_the_file_names_file_key_and_value(refusal):
    message = refusal(text=AUTOENCODER + "train: {images: many}\n")
    assert "config.yaml: train.images is " in message
    assert "'many'" in message


@pytest.mark.parametrize(
    "override", ["train=5", "model.levels=[16, 8]", "model.levels.0.factor=8", "image_size=32", "train.images=null"]
)
def test_a_value_of_the_wrong_shape_is_one_line(refusal, override):
    assert refusal(override).startswith(f"{override}: ")


def test_an_interpolation_that_leads_nowhere_names_its_key(refusal):
    message = refusal(text=AUTOENCODER.replace("runs/a", "${nowhere}"))
    assert "run_dir: " in message
    assert "nowhere" in message


def test_a_missing_required_key_is_named(refusal):
    assert "data.root is not set; give it as data.root=VALUE" in refusal(text="run_dir: a\nimage_size: [8, 8]\n")
    assert "run_dir is not set" in refusal(text=AUTOENCODER.replace("run_dir: runs/a", ""))
    assert "data.shards is not set" in refusal(text="run_dir: a", schema=FlowTraining)


@pytest.mark.parametrize("text", ["train.images", "--fast"])
def test_an_override_without_an_equals_sign_is_explained(refusal, text):
    assert refusal(text) == f"'{text}' is not key=value, for example train.batch_size=8"


@pytest.mark.parametrize("text", ["a: [b", "\tx: 3", "a: b: c"])
def test_bad_yaml_names_the_file(refusal, text):
    assert "config.yaml: not valid YAML (" in refusal(text=text)


def test_a_list_at_the_top_is_explained(refusal):
    assert "config.yaml: expected 'key: value' lines" in refusal(text="- a\n- b\n")


def test_bad_yaml_in_an_override_is_one_line(refusal):
    assert refusal("train.images=[1").startswith("train.images=[1: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such config file"):
        load_config(FlowTraining, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("precision=fp16", "auto, bf16, fp32"),
        ("model.latent=ae", "kl, vq"),
        ("model.skip=all", "res_skip, residual, skip, none"),
        ("model.attention.encoder=full", "spatial_channel, spatial, channel, linear, none"),
        ("model.attention.decoder=full", "spatial_channel, spatial, channel, linear, none"),
        ("model.encoder.pooling=min", "average, max, unshuffle"),
        ("model.decoder.branch=conv", "residual, vit"),
        ("data.crop=corner", "center, random"),
        ("loss.gan.mode=manual", "adaptive, constant"),
        ("train.decay=linear", "constant, cosine"),
    ],
)
def test_choices_are_listed(refusal, override, choices):
    key, value = override.split("=")
    assert refusal(override).endswith(f": {key} is '{value}'; choose one of {choices}")


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("scaling=none", "unit, paper, channel"),
        ("data.posterior=mean", "sample, mode"),
        ("model.attention=linear", "spatial_channel, spatial, channel, none"),
    ],
)
def test_choices_of_the_flow_are_listed(refusal, override, choices):
    key, value = override.split("=")
    message = refusal(override, text=FLOW, schema=FlowTraining)
    assert message.endswith(f": {key} is '{value}'; choose one of {choices}")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("model.encoder.image_patch=3", "model.encoder.image_patch is 3; choose one of 1, 2, 4, 8, 16"),
        ("train.images=0", "train.images is 0; it must be at least 1"),
        ("train.batch_size=0", "train.batch_size is 0"),
        ("train.accumulate=0", "train.accumulate is 0"),
        ("train.learning_rate=0", "train.learning_rate is 0"),
        ("checkpoint.every=0", "checkpoint.every is 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last is 0"),
        ("log.every=0", "log.every is 0; it must be at least 1"),
        ("data.validation=1", "data.validation is 1.0"),
        ("data.zoom=0.5", "data.zoom is 0.5"),
        ("data.zoom=2", "data.zoom needs data.crop=random"),
        ("ema.widths=[0.3]", "ema.widths is [0.3]; it must be below 0.28"),
        ("ema.export=0.2", "ema.export is 0.2; choose one of ema.widths [0.05, 0.1]"),
        ("model.decoder.dropout=1", "model.decoder.dropout is 1.0"),
        ("model.decoder.coarse_init=0", "model.decoder.coarse_init is 0.0"),
        ("model.encoder.blocks=0", "model.encoder.blocks is 0"),
        ("model.encoder.widths=[8, 8]", "model.encoder.widths has 2 entries; factors 1 to 16 need 5"),
        ("model.decoder.widths=[8, 8, 8, 8, 6]", "model.decoder.widths [8, 8, 8, 8, 6]: multiples of 4"),
        ("device=tpu", "device is 'tpu'"),
        ("image_size=[32]", "image_size is [32]; give [height, width]"),
        ("image_size=[0, 32]", "image_size is [0, 32]"),
    ],
)
def test_rules_name_key_and_value(refusal, override, fault):
    assert fault in refusal(override)


@pytest.mark.parametrize(
    ("levels", "fault"),
    [
        ([], "model.levels is empty"),
        ([(12, 4)], "factor 12 is not a power of two"),
        ([(0, 4)], "model.levels.factor is 0; it must be at least 1"),
        ([(16, 0)], "model.levels.channels is 0; it must be at least 1"),
        ([(8, 4), (16, 4)], r"factors \[8, 16\] must fall from coarse to fine"),
        ([(16, 4), (16, 4)], r"factors \[16, 16\] must fall .* each once"),
        ([(64, 4), (16, 4)], r"image_size \[32, 64\]: both sides must be multiples of the coarsest factor, 64"),
    ],
)
def test_rules_of_the_levels(refusal, levels, fault):
    text = ", ".join(f"{{factor: {f}, channels: {c}}}" for f, c in levels)
    assert re.search(fault, refusal(f"model.levels=[{text}]"))
    with pytest.raises(UserError, match=fault):  # as stage two hears it, from its shards
        NCSNppConfig().resolve([32, 64], [Level(f, c) for f, c in levels])


def test_a_linear_base_has_no_more_channels_than_its_blocks_have_values(load, refusal):
    """At factor 8 and patches of 4 a block is 2x2 of a reduced image: 12 values."""
    keys = ["model.base=linear", "model.patch=4"]
    keys += [f"model.{half}.widths=[8, 8, 8]" for half in ("encoder", "decoder")]
    load(*keys, "model.levels=[{factor: 16, channels: 6}, {factor: 8, channels: 12}]")
    message = refusal(*keys, "model.levels=[{factor: 16, channels: 6}, {factor: 8, channels: 13}]")
    assert "model.base=linear: the finest level has 13 channels, but its blocks have 12 values" in message
    assert "model.base=linear needs latent=kl" in refusal("model.base=linear", "model.latent=vq")


def test_a_level_without_channels_is_named_where_it_was_given(refusal):
    message = refusal("model.levels=[{factor: 16}]")
    assert message.startswith(
        "model.levels=[{factor: 16}]: model.levels is not whole: model.levels[0].channels is not set"
    )


@pytest.mark.parametrize("config", [tiny_autoencoder_config(), tiny_network_config()], ids=["autoencoder", "flow"])
def test_a_saved_model_config_loads_equal(tmp_path, config):
    save_config(config, tmp_path / "config.yaml")
    schema = AutoencoderConfig if isinstance(config, AutoencoderConfig) else NCSNppConfig
    assert load_saved(schema, tmp_path / "config.yaml") == config


def test_a_saved_training_config_loads_equal(load, tmp_path):
    text = ["run_dir='a: b'", "data.root=a # ${b} \\${c} é"]
    config = load("train.images=7", "loss.gan.learning_rate=1e-5", "ema.widths=[0.05, 0.2]", *text)
    save_config(config, tmp_path / "saved.yaml")
    assert load_saved(AutoencoderTraining, tmp_path / "saved.yaml") == config
    flow = load("rectified_flow.level_weights=[1, 2]", text=FLOW, schema=FlowTraining)
    save_config(flow, tmp_path / "flow.yaml")
    assert load_saved(FlowTraining, tmp_path / "flow.yaml") == flow
    assert load_saved(FlowTraining, tmp_path / "flow.yaml") != load(text=FLOW, schema=FlowTraining)


def test_a_saved_config_says_what_it_is(load, tmp_path):
    save_config(load(), tmp_path / "saved.yaml")
    assert (tmp_path / "saved.yaml").read_text().startswith("format: 1\nkind: train-ae\n")
    with pytest.raises(UserError, match=r"saved\.yaml: is a config of kind train-ae, not train-flow"):
        load_config(FlowTraining, tmp_path / "saved.yaml")
    assert load_config(AutoencoderTraining, tmp_path / "saved.yaml", ["train.images=3"]).train.images == 3
    newer = (tmp_path / "saved.yaml").read_text().replace("format: 1", "format: 2")
    (tmp_path / "saved.yaml").write_text(newer)
    with pytest.raises(UserError, match=r"saved\.yaml: format 2, this version reads up to 1"):
        load_saved(AutoencoderTraining, tmp_path / "saved.yaml")


def test_an_older_models_config_means_what_it_meant(tmp_path):
    """Saved before these keys, and before formats had numbers."""
    lines = to_yaml(tiny_autoencoder_config()).splitlines()
    new = ("format:", "kind:", "image_patch:", "linear_heads:", "zero_init:", "coarse_init:")
    (tmp_path / "old.yaml").write_text("\n".join(line for line in lines if not line.strip().startswith(new)))
    config = load_saved(AutoencoderConfig, tmp_path / "old.yaml")
    assert (config.encoder.image_patch, config.encoder.linear_heads, config.decoder.zero_init) == (1, False, False)
    assert (EncoderConfig().image_patch, EncoderConfig().linear_heads) == (4, True)


def section_of(schema, name):
    """The class that declares a key."""
    for part in name.split(".")[:-1]:
        schema = optional(get_type_hints(schema)[part])[0]
    return schema


@pytest.mark.parametrize("schema", [AutoencoderTraining, FlowTraining])
def test_every_number_is_declared_with_its_bounds_and_they_hold(schema, tmp_path):
    """Generated from the schema: nan, infinity, and values just and far beyond each bound; as text, those and words,
    for some keys: how text is read is not the key's, and OmegaConf takes its time."""
    (tmp_path / "config.yaml").write_text(AUTOENCODER if schema is AutoencoderTraining else FLOW)
    checked = 0
    for number, leaf in enumerate(leaf for leaf in leaves(schema) if leaf.number is not None):
        low = leaf.rules["at_least"] if leaf.rules["at_least"] is not None else leaf.rules["above"]
        high = leaf.rules["at_most"] if leaf.rules["at_most"] is not None else leaf.rules["below"]
        assert low is not None, f"{leaf.name} says not how small it may be"
        wrong = ["nan", "inf", "-inf", "1e400", "-1000000", str(low - 1)]
        wrong += [str(low)] if leaf.rules["above"] is not None else []
        wrong += [str(high * 10 + 1)] if high is not None else []
        wrong += [str(high)] if leaf.rules["below"] is not None else []
        listed, field = element(optional(leaf.type)[0]) is not optional(leaf.type)[0], leaf.name.rpartition(".")[2]
        for text in wrong:
            value = float(text) if leaf.number is float or not text.lstrip("-").isdigit() else int(text)
            with pytest.raises(UserError, match=rf"{field} is .*{re.escape(str(value))}"):
                section_of(schema, leaf.name)(**{field: [value] if listed else value})
            checked += 1
        if number % 8:
            continue
        wrong += ["many", "1.5x", *(["0.5"] if leaf.number is int else [])]
        wrong += ["1" + "0" * 400] if high is not None or leaf.number is float else []
        for value in wrong:
            with pytest.raises(UserError) as caught:
                load_config(schema, tmp_path / "config.yaml", [f"{leaf.name}=" + (f"[{value}]" if listed else value)])
            assert leaf.name in str(caught.value), f"{leaf.name}={value}: {caught.value}"
            assert "\n" not in str(caught.value)
    assert checked > 200


def test_odd_text_is_one_line(load):
    for name in ("data.root", "run_dir", "loss.perceptual.weights"):
        for empty in ("", "  "):
            with pytest.raises(UserError, match=f"{name} is empty; give a path"):
                load(f"{name}={empty}")
    with pytest.raises(UserError, match=r"train\.images: is nested too deeply"):
        load(f"train.images={'[' * 3000}")
    assert load("run_dir=~nosuchuser/run").run_dir == "~nosuchuser/run"


def test_what_may_change_when_a_run_resumes(load):
    """The remedies that messages name, and what is not the run: marked where they are declared."""
    before = load()
    free = ["train.images=9", "train.batch_size=2", "train.accumulate=2", "train.learning_rate=1e-5", "data.workers=0",
            "data.root=x", "run_dir=y", "precision=fp32", "model.checkpoint_factors=[1]", "log.every=3", "device=cpu",
            "checkpoint.keep_last=9", "train.regions=2", "data.max_bad_fraction=0.5", "ema.export=0.1"]  # fmt: skip
    assert differences(before, load(*free)) == []
    fixed = ["train.warmup=9", "train.beta1=0.5", "seed=1", "data.flip=false", "model.skip=none", "data.upscale=true",
             "loss.gan.weight=0", "model.levels=[{factor: 16, channels: 7}, {factor: 8, channels: 4}]"]  # fmt: skip
    for override in fixed:
        assert [key for key, _, _ in differences(before, load(override))] == [override.split("=")[0]]


def presets(folder):
    found = sorted((ROOT / folder).glob("*.yaml"))
    assert found
    return found


LEARNED = [path for path in presets("autoencoder_configs") if kind_of(path) not in FIXED]


@pytest.mark.parametrize("path", LEARNED, ids=lambda path: path.stem)
def test_autoencoder_presets_load(path):
    config = load_config(AutoencoderTraining, path, ["data.root=x"])
    assert config.data.root == "x"
    assert config.model.image_size == config.image_size
    assert path.read_text().startswith("# "), "the first line says what it reproduces"


@pytest.mark.parametrize("path", presets("diffusion_configs"), ids=lambda path: path.stem)
def test_diffusion_presets_load_and_fit_their_autoencoder(path):
    config = load_config(FlowTraining, path, ["data.shards=x"])
    assert config.data.shards == "x"
    assert path.read_text().startswith("# "), "the first line says what it reproduces"
    partner = ROOT / "autoencoder_configs" / path.name
    if kind_of(partner) in FIXED:
        fixed = load_config(FIXED[kind_of(partner)], partner)
        config.resolve(fixed.image_size, fixed.levels)
    else:
        learned = load_config(AutoencoderTraining, partner, ["data.root=x"])
        config.resolve(learned.image_size, learned.model.levels)
    assert config.model.attention_factors is not None


def test_what_is_not_used_or_never_acts_is_said():
    def said(*keys):
        plain = [
            "run_dir=r",
            "data.root=d",
            "loss.perceptual.weight=0",
            "loss.gan.weight=0",
            "train.level_target=image",
        ]
        return load_config(AutoencoderTraining, ROOT / "autoencoder_configs/demo.yaml", [*plain, *keys]).unused()

    assert said() == []
    assert said("train.images=100", "loss.gan.weight=0.5", "loss.gan.start=60", "loss.gan.disc_warmup=40") == [
        "loss.gan never acts: it begins at image 100, and train.images is 100"
    ]
    assert said("loss.perceptual.weight=1", "loss.perceptual.start=10000") == [
        "loss.perceptual never acts: it begins at image 10000, and train.images is 10000"
    ]
    assert said("train.optimizer=adam", "train.max_norm=1") == [
        "train.max_norm=1 is not used: it is for train.optimizer=muon"
    ]
    assert said("train.level_dropout=0", "train.level_target=low_pass") == [
        "train.level_target=low_pass is not used: train.level_dropout is 0"
    ]
