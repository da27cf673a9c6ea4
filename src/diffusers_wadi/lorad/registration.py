"""The one place that writes into PEFT: a `PeftType.LORAD` member, and the mappings from it to our classes.

PEFT's own registration refuses names that its enum lacks, and PEFT reads `peft_type.value`, so a plain string will not
do: the enum gets a real member. Everything here may run any number of times.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

__all__ = ["lorad_peft_type", "register_lorad"]

_NAME = "LORAD"


def lorad_peft_type() -> PeftType:
    """`PeftType.LORAD`, adding the member to PEFT's enum where it is missing."""
    if _NAME not in PeftType.__members__:
        _add_member(_NAME)
    return PeftType[_NAME]


def _add_member(name: str) -> None:
    """An enum cannot be subclassed once it has members, so the member is built by hand, with value = name."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    # Attribute access (and, on some Python versions, unpickling) reads the class; the metaclass setter would refuse
    # a name that is by now a member.
    type.__setattr__(PeftType, name, member)


def register_lorad() -> None:
    """Tell PEFT which config and which tuner belong to `PeftType.LORAD`.

    Raises:
        KeyError: another package has registered its own "lorad" already.
    """
    # Imported here because the config needs `lorad_peft_type` from this module.
    from diffusers_wadi.lorad.config import LoRaDConfig
    from diffusers_wadi.lorad.model import LoRaDModel

    if PEFT_TYPE_TO_CONFIG_MAPPING.get(lorad_peft_type()) is not LoRaDConfig:
        register_peft_method(name=_NAME.lower(), config_cls=LoRaDConfig, model_cls=LoRaDModel)
