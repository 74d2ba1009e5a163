"""Models and tokenizers on the Hugging Face Hub and in folders: model.safetensors, config.json and a model card."""

import json
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin

from mvar.utils.files import atomic_write, expanded, write_json

CARD_FILE = "README.md"

Module = TypeVar("Module", bound="HubMixin")


class HubMixin(PyTorchModelHubMixin):
    """huggingface_hub's mixin, which reads and writes as :func:`mvar.load_model` and :func:`mvar.save`.

    A folder or repository contains one module. The mixin's record of the arguments of `__init__` is not used: the
    configuration is `config`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    @classmethod
    def from_pretrained(
        cls: type[Module],
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Module:
        """Load a module in float32 and evaluation mode.

        Called on :class:`mvar.Model`, it returns an :class:`mvar.MVAR` or :class:`mvar.VAR`. The configuration is that
        of config.json; without it that in model.safetensors; without both it is inferred from the weights.

        Args:
            pretrained_model_name_or_path: a folder of :meth:`save_pretrained`, owner/name on the Hugging Face Hub, or
                a file as for :func:`mvar.load_model`.
            map_location: device of the weights.
            force_download, token, cache_dir, local_files_only, revision: of the Hub, as in huggingface_hub.
            options: of a tokenizer: `resolution` or `patch_nums`, as in :func:`mvar.load_tokenizer`.

        Raises:
            OSError: there is no such folder, file or repository, or it could not be downloaded.
            CheckpointError: a file is not valid, or belongs to another class.
        """
        from mvar import checkpoint, stored

        name = str(pretrained_model_name_or_path)
        if not name.startswith(stored.HUB) and not expanded(name).exists():
            if name.count("/") != 1 or name.startswith((".", "/", "~")):
                expected = "a folder of save_pretrained, or owner/name on the Hugging Face Hub"
                raise FileNotFoundError(f"{name}: no such folder; expected {expected}")
            name = stored.HUB + name
        download: dict[str, Any] = {
            "force_download": force_download,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "revision": revision,
        }
        kind: Any = cls
        try:
            if issubclass(kind, checkpoint.Tokenizer):
                return stored.StoredTokenizer(name, kind, download, checkpoint.token_maps(**options)).tokenizer(
                    map_location
                )
            make = checkpoint.from_config if kind is checkpoint.Model else kind
            return stored.StoredModel(name, make, download, **options).model(map_location)
        except OSError as error:
            if name == stored.HUB + str(pretrained_model_name_or_path):  # may be a mistyped folder
                raise OSError(f"{pretrained_model_name_or_path}: no such folder; {error}") from error
            raise

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        license: str | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        config: None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write model.safetensors as :func:`mvar.save`, config.json and, unless there is one, README.md to a folder.

        Args:
            save_directory: the folder.
            dtype: as in :func:`mvar.save`.
            license: of the weights, an identifier of the Hub such as "mit", for the model card. None: not stated.
            repo_id: name on the Hub, for the model card and `push_to_hub`; None for the folder's name.
            push_to_hub: also call :meth:`push_to_hub` with `push_to_hub_kwargs`.
            model_card_kwargs: `dtype`, `license`, `repo_id` and `card`, by which :meth:`push_to_hub` passes them on.
            config: for the mixin, which passes None.

        Returns:
            The URL of the commit with `push_to_hub`.

        Raises:
            TypeError, ValueError, OSError: as :func:`mvar.save`.
            ValueError: the folder has the configuration of a tokenizer instead of a model, or of a model.
        """
        from mvar import checkpoint, stored

        if config is not None:
            raise TypeError("config: expected None, as the configuration is that of the module")
        settings: dict[str, Any] = {"dtype": dtype, "license": license}
        card = settings | {"repo_id": repo_id} | (model_card_kwargs or {})
        text = card.pop("card", None)
        folder, module = expanded(save_directory), cast(Any, self)
        content = checkpoint.config_json(module)
        _check_kind(folder / stored.CONFIG_FILE, content)
        checkpoint.save(folder / stored.WEIGHTS_FILE, module, dtype=card["dtype"])
        write_json(folder / stored.CONFIG_FILE, content)
        if not (folder / CARD_FILE).exists():  # as the mixin, since it may have been edited
            with atomic_write(folder / CARD_FILE) as temporary:
                temporary.write_text(text or self.generate_model_card(**card).content, encoding="utf-8")
        if push_to_hub:
            text = (folder / CARD_FILE).read_text(encoding="utf-8")
            return self.push_to_hub(repo_id or folder.name, card=text, **settings, **push_to_hub_kwargs)
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        license: str | None = None,
        card: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the files of :meth:`save_pretrained` in one commit. Returns its URL.

        Args:
            repo_id: owner/name.
            dtype, license: as in :meth:`save_pretrained`.
            card: the text of README.md; None for a new model card. It replaces that of the repository, except with
                `ignore_patterns="README.md"`.
            options: of huggingface_hub's mixin: `private`, `token`, `branch`, `create_pr`, `commit_message`, …
        """
        settings = {"dtype": dtype, "license": license, "repo_id": repo_id, "card": card}
        return super().push_to_hub(repo_id, model_card_kwargs=settings, **options)

    def generate_model_card(
        self, *, dtype: torch.dtype | None = None, license: str | None = None, repo_id: str | None = None
    ) -> ModelCard:
        """The model card: what the configuration says, and how to use the weights."""
        from mvar.models.model_card import model_card

        return model_card(cast(Any, self), dtype, license, repo_id)


def _check_kind(path: Path, content: dict[str, Any]) -> None:
    """Raise ValueError if the file is the configuration of a module of the other kind, which would be overwritten."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for kind, field in (("model", "depth"), ("tokenizer", "ch")):
        if field in stored and field not in content:
            raise ValueError(f"{path.parent}: has a {kind}, which would be overwritten; give another folder")
