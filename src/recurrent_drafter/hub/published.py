"""What a published drafter runs when somebody calls

    model.generate(**inputs, custom_generate="user/drafter", trust_remote_code=True)

Its ``custom_generate/generate.py`` calls `generate_with_drafter`. Transformers (5.19) copies that file into its modules
cache and runs it there, under the commit that it came from; of a local folder it keeps only a hash of the code.
"""

import functools
import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator

# What people may pass on to the download of the drafter.
DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def generate_with_drafter(
    model: PreTrainedModel,
    repo_id: str,
    code: str,
    *,
    inputs: Tensor | None = None,
    input_ids: Tensor | None = None,
    drafter: str | None = None,
    **arguments: Any,
) -> Any:
    """``model.generate`` with a published drafter, of the very commit that the code is from.

    Args:
        model: the verifier.
        repo_id: the repository that ``code`` was written for.
        code: the file that calls this, as transformers has put it away.
        inputs: the prompts (B, S); ``input_ids`` is their other name.
        drafter: a folder or another repository to load the drafter from instead. From a local folder it is needed,
            because transformers does not tell where that is.
        arguments: those of `generate`; those of a download (``revision``, ``token``, ``cache_dir``, ...).

    A streamer and stop strings work here. The drafter stays loaded for the next call; so does the model, until another
    one is drafted for or `loaded.cache_clear` is called.
    """
    prompts = input_ids if input_ids is not None else inputs
    if prompts is None:
        raise ValueError("decoding with a drafter needs input_ids: inputs_embeds alone cannot be drafted for")
    download = {name: arguments.pop(name) for name in DOWNLOAD if name in arguments}
    if drafter is None:
        commit = Path(code).parents[1].name
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError(
                "custom_generate names a local folder, and transformers does not tell which: pass drafter=FOLDER too"
            )
        drafter, download["revision"] = repo_id, commit
    given = {name: value for name, value in arguments.items() if value is not None}
    speculator = loaded(model, model.device, model.dtype, drafter, **download)
    return speculator.generate(prompts, **given)


@functools.lru_cache(maxsize=1)
def loaded(
    model: PreTrainedModel, _device: Any, _dtype: Any, drafter: str, **options: Any
) -> RecurrentDraftingSpeculator:
    """A drafter attached to a model as it lies now; measured costs and the acceptance seen so far stay with it."""
    return RecurrentDraftingSpeculator.from_pretrained(drafter, verifier=model, **options)
