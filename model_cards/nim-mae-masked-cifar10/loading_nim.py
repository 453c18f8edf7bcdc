"""What every model and configuration of this package does when it is loaded, and the errors of damaged files."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .image_processing import check_processor_file


NO_MEMORY = re.compile(r"can't allocate memory|out of memory")  # PyTorch's allocators' words
_LOADED_FROM = "_loaded_from"  # the argument that tells `from_dict` what `get_config_dict` has read


class WeightsDoNotFitError(ValueError, RuntimeError):
    """Weights of other shapes than the model's; a RuntimeError, too, because transformers raises that."""


def what_is_wrong(error: BaseException) -> BaseException:
    """The cause where strict dataclasses wrap the message of a validator; any other error itself."""
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def naming_damaged_files(path: str | os.PathLike, values: bool = True) -> Iterator[None]:
    """Names the model whose files are damaged or make no model; the errors of transformers are of many types.

    With `values=False` a ValueError or RuntimeError that may be about an argument of the caller stays as it is.
    """
    try:
        yield
    except (OSError, StrictDataclassError, MemoryError, ImportError):  # these name the file, the field or the package
        raise
    except SafetensorError as error:
        raise ValueError(f"the weights in {str(path)!r} are damaged ({error}); make or download them again") from error
    except Exception as error:
        if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
            raise
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        if isinstance(error, RuntimeError) and ("mismatch" in str(error) or "conversion of the weights" in str(error)):
            raise WeightsDoNotFitError(
                f"the weights in {str(path)!r} do not fit its config.json, or what was given in its place; was it "
                "edited by hand? (The report above names the weights; ignore_mismatched_sizes=True makes them anew.)"
            ) from None
        if not values and (type(error) in (ValueError, RuntimeError) or "unexpected keyword" in str(error)):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        words = " ".join(str(error).split())[:400]
        raise ValueError(f"the files in {str(path)!r} make no model ({kind}{words}); were they edited?") from error


class LoadedConfigMixin:
    """Names the file where a configuration is none; for the first place among the bases of a configuration's class."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As transformers'. OSError where there is no config.json, ValueError where it holds no fields."""
        with naming_damaged_files(pretrained_model_name_or_path, values=False):
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not isinstance(config_dict, dict):
            raise ValueError(
                f"config.json of {str(pretrained_model_name_or_path)!r} must hold a mapping of fields, got "
                f"{type(config_dict).__name__}; download it again"
            )
        if not config_dict:
            raise OSError(
                f"{str(pretrained_model_name_or_path)!r} has no config.json, or one without fields; name the directory "
                "of a model, or download it again"
            )
        return config_dict, kwargs | {_LOADED_FROM: pretrained_model_name_or_path}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers'. A field of the wrong type is a ValueError that names the field and the file."""
        loaded_from = kwargs.pop(_LOADED_FROM, None) or kwargs.get("name_or_path")  # the latter from AutoConfig
        name = loaded_from or config_dict.get("_name_or_path") or "the dictionary"
        try:
            with naming_damaged_files(name, values=False):
                return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            words = " ".join(str(what_is_wrong(error)).split())
            raise ValueError(f"config.json of {str(name)!r}: {words}; was it edited by hand?") from error


class LoadedAsBuiltMixin:
    """Parameters that a model is built with frozen are frozen after `from_pretrained` too.

    transformers puts a new, trainable parameter in the place of each that it loads, so that a position table or a mask
    token outside the graph would be trained, or stop distributed training for want of a gradient.
    """

    def post_init(self):
        super().post_init()
        self._frozen_as_built = {name for name, weight in self.named_parameters() if not weight.requires_grad}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """As transformers', see the class; damaged files are a ValueError or OSError that names them."""
        check_processor_file(pretrained_model_name_or_path)  # `pipeline` reads it next, with errors that name nothing
        with naming_damaged_files(pretrained_model_name_or_path, values=False):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = (
            loaded[0] if isinstance(loaded, tuple) else loaded
        )  # with `output_loading_info=True` a report comes along
        for name, weight in model.named_parameters():
            if name in model._frozen_as_built:
                weight.requires_grad_(False)
        return loaded
