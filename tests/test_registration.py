import importlib
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftType

import peft_tlora
from peft_tlora import TLoraConfig, TLoraModel
from peft_tlora.integrations.peft import register


def test_the_type_is_a_member_of_the_enum():
    member = PeftType("TLORA")
    assert member is PeftType.TLORA is PeftType["TLORA"]
    assert isinstance(member, PeftType)
    assert member == "TLORA"
    assert member.name == member.value == "TLORA"
    assert member in list(PeftType)
    assert repr(member) == "<PeftType.TLORA: 'TLORA'>"
    assert hash(member) == hash("TLORA")
    assert pickle.loads(pickle.dumps(member)) is member


def test_no_other_member_changed():
    code = (
        "import peft\n"
        "before = list(peft.PeftType)\n"
        "import peft_tlora\n"
        "assert list(peft.PeftType) == [*before, 'TLORA']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_again_is_harmless_and_the_newest_classes_win():
    class NewerModel(TLoraModel):
        pass

    members = list(PeftType)
    register(TLoraConfig, NewerModel)
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TLORA] is NewerModel
    importlib.reload(peft_tlora)
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TLORA] is TLoraModel
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TLORA] is TLoraConfig
    assert list(PeftType) == members


def test_a_second_import_of_the_package_works():
    code = (
        "import sys, peft_tlora\n"
        "for name in [name for name in sys.modules if 'peft_tlora' in name]:\n"
        "    del sys.modules[name]\n"
        "import peft_tlora, peft, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model = peft.get_peft_model(model, peft_tlora.TLoraConfig(r=2, target_modules=['0']))\n"
        "assert isinstance(model.base_model, peft_tlora.TLoraModel)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_pickled_in_one_process_loads_in_another(tmp_path):
    path = tmp_path / "config.pkl"
    path.write_bytes(pickle.dumps(TLoraConfig(r=4, min_rank=1)))
    code = f"import pickle; c = pickle.load(open({str(path)!r}, 'rb')); assert c.min_rank == 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_exported():
    assert set(peft_tlora.__all__) == {
        "FusedGeneration",
        "TLoraConfig",
        "TLoraModel",
        "__version__",
        "active_rank",
        "load_tlora_weights",
        "orthogonality_loss",
        "timestep_context",
        "timestep_from",
    }
    for name in peft_tlora.__all__:
        assert getattr(peft_tlora, name)


def test_unknown_enum_names_still_raise():
    with pytest.raises(ValueError, match="NOTHING"):
        PeftType("NOTHING")


@pytest.mark.parametrize("version", ["0.17.1", "0.22.0", "0.23.0.dev0"])
def test_an_untested_version_of_peft_warns_once(version):
    code = (
        "import warnings, peft\n"
        f"peft.__version__ = {version!r}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import peft_tlora\n"
        "    import peft_tlora.model\n"
        "texts = [str(w.message) for w in caught if 'is tested with PEFT' in str(w.message)]\n"
        f"assert len(texts) == 1 and {version!r} in texts[0], texts\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_installed_version_of_peft_does_not_warn():
    code = "import warnings; warnings.simplefilter('error', UserWarning); import peft_tlora"
    subprocess.run([sys.executable, "-c", code], check=True)
