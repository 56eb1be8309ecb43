import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.compare import Run
from qat_lightning.compare.settings import differing, flatten, seed_of, settings_of
from tests.compare.making import plain, qat


def labelled(runs, **options):
    return {setting.label: setting.values for setting in differing(runs, **options)}


def test_seeds_names_and_places_are_no_difference():
    assert labelled([qat("fx", 0), qat("fx", 1)]) == {}


def test_a_float_run_has_no_mode_although_its_configuration_has_one():
    found = labelled([plain(), qat("fx"), qat("pt2e")])
    assert found == {"method": ("float", "qat", "qat"), "mode": ("–", "fx", "pt2e")}


def test_what_follows_from_a_choice_is_left_out_unless_every_difference_is_wanted():
    runs = [plain(), qat("fx"), qat("pt2e")]
    keys = {setting.key for setting in differing(runs, every=True)}
    assert keys == {
        "method.name",
        "quantization._target_",
        "quantization.mode",
        "quantization.backend",
        "quantization.start",
    }


def test_two_settings_said_together_are_both_kept():
    def run(value):
        words = (f"quantization.freeze_observers={value}", f"quantization.freeze_batchnorm={value}")
        config = {"quantization": {"freeze_observers": value, "freeze_batchnorm": value}}
        return Run(str(value), str(value), config=config, overrides=words)

    assert list(labelled([run(0.5), run(0.7)])) == ["freeze_observers", "freeze_batchnorm"]


def test_a_part_that_only_some_have_tells_them_apart_by_its_class():
    stopping = {"early_stopping": {"patience": 10, "_target_": "lightning.pytorch.callbacks.EarlyStopping"}}
    runs = [Run("a", "a", config={"lr": 1, "callbacks": stopping}), Run("b", "b", config={"lr": 1, "callbacks": {}})]
    assert labelled(runs) == {"early_stopping": ("EarlyStopping", "–")}


def test_labels_are_as_short_as_they_can_be_told_apart():
    runs = [Run(str(v), str(v), config={"a": {"lr": v}, "b": {"lr": -v}, "c": {"wd": v * v}}) for v in (1, 2)]
    assert set(labelled(runs)) == {"a.lr", "b.lr", "wd"}


def test_globs_leave_settings_out():
    assert labelled([qat("fx"), qat("pt2e")], ignore=["quantization.*"]) == {}


def test_the_runs_own_seed_is_before_that_of_a_part():
    assert seed_of(qat("fx", 3)) == "3"
    assert seed_of(Run("a", "a", config={"net": {"lr": 1}})) == ""


def test_values_whose_short_forms_are_alike_are_shown_in_full():
    def column(*values):
        return labelled([Run(value, value, config={"setting": value}) for value in values])["setting"]

    assert column("timm.models.resnet50", "timm.models.vit") == ("resnet50", "vit")
    both = ("timm.models.resnet50", "torchvision.models.resnet50")
    assert column(*both, both[0]) == (*both, both[0])
    assert column("a.csv", "b.csv") == ("a.csv", "b.csv")


def test_the_name_and_the_class_of_a_section_have_different_labels():
    configs = [{"net": {"name": name, "_target_": f"my.{kind}"}} for name in "ab" for kind in ("Small", "Large")]
    runs = [Run(str(i), str(i), config=config) for i, config in enumerate(configs)]
    assert labelled(runs) == {"net.name": ("a", "a", "b", "b"), "net._target_": ("Small", "Large", "Small", "Large")}


# lowercase names, so that none is one that stands for a place
values = st.integers(0, 2) | st.sampled_from(["a.x", "b.x", "b.y", "x"])
configs = st.dictionaries(st.sampled_from("abc"), values | st.dictionaries(st.sampled_from("xyz"), st.integers(0, 1)))


@given(st.lists(configs, min_size=1, max_size=6))
def test_runs_alike_in_what_is_given_are_alike_in_all(configs):
    runs = [Run(str(i), str(i), config=config) for i, config in enumerate(configs)]
    given_ = [setting.values for setting in differing(runs)]
    for i, one in enumerate(runs):
        for j, other in enumerate(runs):
            alike = all(values[i] == values[j] for values in given_)
            assert alike == (settings_of(one) == settings_of(other))


@given(configs)
def test_flattening_keeps_every_leaf(config):
    leaves = sum(len(value) if isinstance(value, dict) else 1 for value in config.values())
    assert len(flatten(config)) == leaves


def test_a_checkpoint_of_float_is_no_setting():
    runs = [qat("fx"), dataclasses.replace(qat("fx"), config=qat("fx").config | {"float_checkpoint": "a/last.ckpt"})]
    assert labelled(runs) == {}


def test_a_number_is_one_setting_whether_a_logger_stored_it_whole_or_as_a_fraction():
    csv = {"label_smoothing": 0.0, "lr": 1.0, "betas": [0.9, 1.0], "optimizer": {"eps": 2.0}}
    wandb = {"label_smoothing": 0, "lr": 1, "betas": [0.9, 1], "optimizer": {"eps": 2}}
    assert labelled([Run("a", "a", config=csv), Run("b", "b", config=wandb)]) == {}


def test_one_epoch_and_the_share_of_all_are_different_settings():
    runs = [Run(str(v), str(v), config={"quantization": {"freeze_observers": v}, "lr": v}) for v in (1, 1.0)]
    assert labelled(runs) == {"freeze_observers": ("1", "1.0")}


def test_long_numbers_are_shown_in_short_unless_they_would_look_alike():
    def column(*values):
        return labelled([Run(str(value), str(value), config={"lr": value}) for value in values])["lr"]

    assert column(0.018224988220277075, 0.1) == ("0.018225", "0.1")
    assert column(0.018224988220277075, 0.018224988220277079) == ("0.018224988220277075", "0.01822498822027708")
    assert column(1.2345678901e-05, 0.1) == ("1.23457e-05", "0.1")
